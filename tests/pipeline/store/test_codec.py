"""Codecs keep their stated error for any numbers, and what they decoded encodes to the same again."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kd.pipeline.store.codec import LIMITS, SMALLEST_SCALE, decode, decoded_dtype, encode
from kd.pipeline.store.signal import ENCODINGS

TINY, HUGE = float(np.finfo(np.float32).smallest_subnormal), 65519.0


def numbers(limit: float) -> st.SearchStrategy[np.ndarray]:
    """float32 [N, D] of any magnitude below `limit`, subnormal ones and whole rows of zeros included."""
    element = st.one_of(
        st.floats(-limit, limit, width=32),
        st.floats(-1, 1, width=32),
        st.floats(-(2.0**-120), 2.0**-120, width=32),
        st.sampled_from([0.0, -0.0, TINY, -TINY, 2.0**-126]),
    )
    return npst.arrays(np.float32, npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6), elements=element)


def below(encoding: str) -> float:
    return float(np.nextafter(min(LIMITS[encoding], float(np.finfo(np.float32).max)), 0, dtype=np.float32))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_was_decoded_encodes_to_the_same_again(encoding: str) -> None:
    @settings(max_examples=150, deadline=None)
    @given(numbers(below(encoding)))
    def check(values_ND: np.ndarray) -> None:
        if values_ND.shape[1] == 0:
            return  # an entry has at least one number
        parts = encode(encoding, values_ND)
        again = encode(encoding, decode(encoding, parts))
        for part, array in parts.items():
            assert array.dtype == ENCODINGS[encoding].parts[part]
            np.testing.assert_array_equal(again[part].view(np.uint8), array.view(np.uint8))

    check()


@settings(max_examples=200, deadline=None)
@given(numbers(below("int8")))
def test_int8_is_off_by_at_most_half_a_scale_in_exact_arithmetic(values_ND: np.ndarray) -> None:
    if values_ND.shape[1] == 0:
        return
    parts = encode("int8", values_ND)
    codes_ND, scales_N = parts[""], parts["scale"]
    assert codes_ND.shape == values_ND.shape and scales_N.shape == values_ND.shape[:1]
    assert (codes_ND != -128).all() and (scales_N >= SMALLEST_SCALE).all()
    decoded_ND = decode("int8", parts)
    assert decoded_ND.dtype == np.float32
    for value_D, code_D, decoded_D, scale in zip(values_ND, codes_ND, decoded_ND, scales_N, strict=True):
        exact = Fraction(float(scale))
        for value, code, decoded in zip(value_D, code_D, decoded_D, strict=True):
            assert Fraction(float(decoded)) == int(code) * exact
            assert abs(Fraction(float(decoded)) - Fraction(float(value))) <= exact / 2
    largest_N = np.abs(values_ND).max(axis=1).astype(np.float64)
    # As `ENCODINGS` states; what is smaller than half the smallest scale is lost to zero.
    worst_N = np.abs(decoded_ND - values_ND.astype(np.float64)).max(axis=1)
    assert (worst_N <= np.maximum(largest_N / 253.9, 2.0**-127)).all() and "253.9" in ENCODINGS["int8"].error


@settings(max_examples=200, deadline=None)
@given(numbers(HUGE))
def test_float16_is_off_by_at_most_what_it_states(values_ND: np.ndarray) -> None:
    decoded = decode("float16", encode("float16", values_ND)).astype(np.float64)
    allowed = np.maximum(np.abs(values_ND.astype(np.float64)) * 2.0**-11, 2.0**-25)
    assert (np.abs(decoded - values_ND) <= allowed).all()


def test_float32_is_exact() -> None:
    values_ND = np.array([[1 / 3, TINY, 3e38]], dtype=np.float32)
    np.testing.assert_array_equal(decode("float32", encode("float32", values_ND)), values_ND)


def test_int8_by_hand() -> None:
    """127 and 254 are 127 times 1 and 2, which have few bits: scales are those, codes the rounded quotients."""
    values_ND = np.array([[127.0, -63.4, 0.5, 1.5], [-254.0, 1.01, 0.99, 0.0], [0.0, 0.0, 0.0, 0.0]])
    parts = encode("int8", values_ND)
    assert parts["scale"].tolist() == [1.0, 2.0, SMALLEST_SCALE]
    assert parts[""].tolist() == [[127, -63, 0, 2], [-127, 1, 0, 0], [0, 0, 0, 0]]
    assert decode("int8", parts).tolist() == [[127, -63, 0, 2], [-254, 2, 0, 0], [0, 0, 0, 0]]


def test_int8_equals_an_independent_formula() -> None:
    """The scale as a decimal fraction of 17 bits, rounded up by hand; codes by exact division."""
    values_ND = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    parts = encode("int8", values_ND)
    for value_D, code_D, scale in zip(values_ND, parts[""], parts["scale"], strict=True):
        quotient = np.float32(np.float32(np.abs(value_D).max()) / np.float32(127))
        mantissa, exponent = np.frexp(np.float64(quotient))
        assert scale == np.ldexp(np.ceil(np.ldexp(mantissa, 17)), int(exponent) - 17)
        exact = [round(Fraction(float(value)) / Fraction(float(scale))) for value in value_D]
        assert code_D.tolist() == exact


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_entries_and_leading_dimensions_are_fine(encoding: str) -> None:
    parts = encode(encoding, np.zeros((0, 5), np.float32))
    assert all(len(array) == 0 for array in parts.values())
    assert decode(encoding, parts).shape == (0, 5)
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    parts = encode(encoding, values)
    padded = {part: array.reshape(2, 3, *array.shape[1:]) for part, array in parts.items()}
    out = np.empty((2, 3, 4), decoded_dtype(encoding))
    assert decode(encoding, padded, out) is out
    np.testing.assert_array_equal(out.reshape(6, 4), decode(encoding, parts))


def test_long_signals_are_encoded_in_blocks_of_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    whole = encode("int8", values)
    monkeypatch.setattr("kd.pipeline.store.codec._BLOCK_NUMBERS", 24)
    for part, array in encode("int8", values).items():
        np.testing.assert_array_equal(array, whole[part])
