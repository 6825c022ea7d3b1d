"""Shard files are byte for byte what zarr-python writes, and prove their own layout."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.store import ArraySpec, Signal, StoreLayout, array_spec
from kd.pipeline.store.layout import fill_value
from kd.pipeline.store.shard import crc32c, decode_index, encode_index, is_contiguous
from kd.pipeline.store.writer import shard_parts

SPECS = [
    array_spec(Signal("logits"), 3),
    array_spec(Signal("hidden.tok", 6), 5),
    array_spec(Signal("hidden.cls", 0), 2, dtype="float32"),
    ArraySpec(Signal("token_ids"), (), "uint16"),
    ArraySpec(Signal("token_ids"), (), "uint32"),
    ArraySpec(Signal("segment_ids"), (), "uint8"),
]


def some_values(spec: ArraySpec, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    if spec.dtype.startswith("float"):
        return rng.normal(size=(count, *spec.shape)).astype(spec.dtype)
    return rng.integers(0, np.iinfo(spec.dtype).max, count, dtype=spec.dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.builds(
        StoreLayout,
        rows_per_shard=st.sampled_from([1, 4, 12, 16]),
        tokens_per_shard=st.sampled_from([7, 16, 64]),
        chunk_bytes=st.sampled_from([1, 16, 40, 10**6]),
    ),
    st.data(),
)
def test_a_shard_file_is_what_zarr_writes(spec: ArraySpec, layout: StoreLayout, data: st.DataObject) -> None:
    capacity = layout.capacity(spec.axis)
    values = some_values(spec, data.draw(st.integers(1, capacity), label="entries"))
    with tempfile.TemporaryDirectory() as folder:
        array = zarr.create_array(
            folder,
            shape=(3 * capacity, *spec.shape),
            dtype=spec.dtype,
            chunks=(layout.chunk_length(spec), *spec.shape),
            shards=(capacity, *spec.shape),
            compressors=None,
            fill_value=fill_value(spec)[()],
            dimension_names=spec.dims,
            attributes={"kd": {"signal": str(spec.signal), "encoding": spec.encoding}},
        )
        array[capacity : capacity + len(values)] = values
        expected = Path(folder, "/".join(["c", "1", *["0"] * len(spec.shape)])).read_bytes()
        assert json.loads(Path(folder, "zarr.json").read_bytes()) == layout.array_metadata(spec, 3)
    ours = b"".join(bytes(part) for part in shard_parts(layout, spec, values))
    assert ours == expected
    assert len(ours) == layout.file_bytes(spec, len(values))


def test_inner_chunks_are_about_a_mebibyte_and_divide_the_shard() -> None:
    layout = StoreLayout()
    tokens = array_spec(Signal("hidden.tok", 6), 384)
    assert layout.chunk_length(tokens) == 1024  # 1365 would fit
    assert layout.chunk_length(array_spec(Signal("logits"), 3)) == 4096  # the whole shard
    assert StoreLayout(rows_per_shard=1000).chunk_length(array_spec(Signal("logits"), 3)) == 1000
    assert StoreLayout(rows_per_shard=7, chunk_bytes=20).chunk_length(array_spec(Signal("logits"), 3)) == 1


def test_writing_a_shard_does_not_copy_the_values() -> None:
    spec = array_spec(Signal("hidden.tok", 6), 4)
    values = np.zeros((5, 4), dtype=np.float16)
    assert np.shares_memory(shard_parts(StoreLayout(), spec, values)[0], values)


def test_crc32c_has_the_value_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_an_index_comes_back_and_a_damaged_one_does_not() -> None:
    encoded = encode_index(4, 3, 100)
    index = decode_index(encoded, 4)
    assert index[:3].tolist() == [[0, 100], [100, 100], [200, 100]]
    for damaged in (encoded[:-1], b"\1" + encoded[1:], encoded[:-1] + b"\1"):
        with pytest.raises(ValueError, match=r"the index has|checksum"):
            decode_index(damaged, 4)


def test_only_chunks_in_order_from_the_start_are_contiguous() -> None:
    index = decode_index(encode_index(4, 3, 100), 4)
    kwargs = {"chunk_length": 10, "chunk_bytes": 100}
    assert is_contiguous(index, entries=30, **kwargs)
    assert is_contiguous(index, entries=21, **kwargs)
    assert not is_contiguous(index, entries=31, **kwargs)  # the last chunk is absent
    assert not is_contiguous(index, entries=99, **kwargs)  # more than the shard has
    assert not is_contiguous(index[[1, 0, 2, 3]], entries=30, **kwargs)
    assert not is_contiguous(index, entries=30, chunk_length=10, chunk_bytes=101)
