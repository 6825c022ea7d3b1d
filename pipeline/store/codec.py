"""Codecs: teacher outputs as the arrays an encoding keeps, and back. Pure functions of arrays.

Dimension key: N entries (rows, tokens or pairs of tokens), D numbers of one entry, of any number of dimensions.

`int8` keeps one scale s per entry and codes -127 to 127, so that the number is code times s. The scale is max|x| / 127
rounded up to 17 significant bits. Code times scale then has at most 24 bits, which float32 holds: decoding is exact,
the error of encoding is at most s/2, and decoded numbers encode to the same codes and scale again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .signal import ENCODINGS

Array = npt.NDArray[Any]

LIMITS: Mapping[str, float] = {"float32": 3.4028235677973366e38, "float16": 65520.0, "int8": 2.0**127}
"""The smallest magnitude that an encoding cannot hold: what its dtype rounds to infinity; for int8, what decoding
could round to infinity."""

SMALLEST_SCALE = np.float32(2.0**-126)
"""Scale of entries of zeros and of numbers near them: the smallest that no processor flushes to zero."""

_BLOCK_NUMBERS = 1 << 20


def encode(encoding: str, values: Array) -> dict[str, Array]:
    """The arrays of an encoding, by part ("" stands for the signal), each [N, ...].

    Args:
        values: [N, D] floating point, finite and below `LIMITS[encoding]` in magnitude.
    """
    if encoding == "int8":
        codes, scales = encode_int8(values.reshape(len(values), math.prod(values.shape[1:])))
        return {"": codes.reshape(values.shape), "scale": scales}
    return {"": values.astype(ENCODINGS[encoding].parts[""], copy=False)}


def decode(encoding: str, parts: Mapping[str, Array], out: Array | None = None) -> Array:
    """The numbers that the arrays of an encoding stand for, [..., D] in `decoded_dtype(encoding)`.

    Args:
        parts: as `encode` makes them; any number of leading dimensions, the same for all.
        out: where to put them; plain numbers are not copied otherwise.
    """
    if encoding == "int8":
        return decode_int8(parts[""], parts["scale"], out)
    if out is None:
        return parts[""]
    out[...] = parts[""]
    return out


def decoded_dtype(encoding: str) -> str:
    """What a reader gets: "float16" for float16, else "float32"."""
    return "float16" if encoding == "float16" else "float32"


def encode_int8(values_ND: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes int8 [N, D], never -128, and scales float32 [N], never zero."""
    codes_ND = np.empty(values_ND.shape, dtype=np.int8)
    scales_N = np.empty(len(values_ND), dtype=np.float32)
    # float64 decides correctly between two codes; in blocks, it takes little memory.
    step = max(1, _BLOCK_NUMBERS // max(1, values_ND[:1].size))
    for start in range(0, len(values_ND), step):
        block_ND = values_ND[start : start + step].astype(np.float32, copy=False)
        scale_N = _scales(np.abs(block_ND).max(axis=-1))
        scales_N[start : start + step] = scale_N
        codes_ND[start : start + step] = np.rint(block_ND / scale_N[:, None].astype(np.float64))
    return codes_ND, scales_N


def decode_int8(codes: Array, scales: Array, out: Array | None = None) -> npt.NDArray[np.float32]:
    """Codes [..., D] times scales [...], float32; exact."""
    scales = scales.reshape(scales.shape + (1,) * (codes.ndim - scales.ndim))
    return np.multiply(codes, scales, out=out, dtype=np.float32)


def _scales(largest_N: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bits_N = (largest_N / np.float32(127)).view(np.uint32)
    # A float32 has 24 significant bits; adding 127 and clearing the last seven rounds a positive one up to 17.
    rounded_N = ((bits_N + np.uint32(127)) & np.uint32(0xFFFFFF80)).view(np.float32)
    return np.maximum(rounded_N, SMALLEST_SCALE)
