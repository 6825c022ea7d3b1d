"""Numbers and bytes to Arrow and back: the same values, slices and chunks included, and no pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from kd.pipeline.store.arrow import bytes_to_arrow, from_arrow, no_memory_kept, to_arrow


@pytest.mark.parametrize("dtype", ["uint32", "int64", "float16"])
def test_numbers_come_back_whatever_they_were_cut_from(dtype: str) -> None:
    values = np.arange(10).astype(dtype)
    column = to_arrow(values[::2])
    assert column.to_pylist() == values[::2].tolist()
    np.testing.assert_array_equal(from_arrow(column, dtype), values[::2])
    np.testing.assert_array_equal(from_arrow(column.slice(2, 2), dtype), values[4:8:2])
    chunked = pa.chunked_array([column.slice(1), column.slice(0, 0), column.slice(0, 1)])
    assert from_arrow(chunked, dtype).tolist() == [*values[2::2].tolist(), 0]


def test_another_type_and_nulls_are_refused() -> None:
    with pytest.raises(ValueError, match="it must be int64 without nulls, got int32"):
        from_arrow(pa.array([1], pa.int32()), np.int64)
    with pytest.raises(ValueError, match="without nulls"):
        from_arrow(pa.array([1, None], pa.int64()), np.int64)


def test_bytes_are_a_column_of_text_or_of_bytes() -> None:
    for dtype, expected in ((pa.string(), ["a", "", "bc"]), (pa.binary(), [b"a", b"", b"bc"])):
        column = bytes_to_arrow([b"a", b"", b"bc"], dtype)
        column.validate(full=True)
        assert column.to_pylist() == expected and column.equals(pa.array(expected, dtype))
    assert len(bytes_to_arrow([], pa.binary())) == 0


def test_what_a_store_writes_is_written_and_read_without_pandas() -> None:
    code = """
import sys
import numpy as np
from kd.pipeline.store.index import decode_index, encode_index
data, _ = encode_index(np.arange(6, dtype=np.uint64).reshape(3, 2), np.array([2, 1, 4]))
assert decode_index(data)[1].tolist() == [2, 1, 4]
from kd.pipeline.store.compacted import compacted_file, decode_compacted, encode_compacted
data = encode_compacted({"one": b"1", "two": b"2"})
assert decode_compacted(data, name=compacted_file(data).split("/")[1]) == {"one": b"1", "two": b"2"}
assert "pandas" not in sys.modules, "an import of half a second"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arrow_takes_memory_from_the_c_library_for_a_while_and_no_longer() -> None:
    own = pa.default_memory_pool().backend_name
    with pytest.raises(KeyError), no_memory_kept():
        assert pa.default_memory_pool().backend_name == "system"
        raise KeyError
    assert pa.default_memory_pool().backend_name == own
