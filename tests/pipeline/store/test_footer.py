"""The footer of a Parquet file as kd reads it, beside what pyarrow says of the same file."""

from __future__ import annotations

import contextlib
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.store.footer import MAX_FOOTER_BYTES, row_groups


def written(rows: int, codec: str, **options: object) -> bytes:
    table = pa.table({"number": range(rows), "text": [str(row) for row in range(rows)], "lists": [[1, 2]] * rows})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=codec, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("codec", ["NONE", "SNAPPY", "GZIP", "ZSTD"])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 3}, {"store_schema": False, "write_statistics": False}])
def test_rows_and_codecs_are_those_that_pyarrow_names(codec: str, options: dict[str, object]) -> None:
    data = written(20, codec, **options)
    metadata = pq.read_metadata(io.BytesIO(data))
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    assert row_groups(data) == [
        (group.num_rows, [group.column(c).compression for c in range(group.num_columns)]) for group in groups
    ]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\0" * 8 + b"PAR1", b"\0" * 100])
def test_bytes_that_are_no_parquet_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not Parquet"):
        row_groups(data)


def test_a_footer_that_says_it_is_huge_is_not_read() -> None:
    size = MAX_FOOTER_BYTES + 1
    with pytest.raises(ValueError, match="its footer has"):
        row_groups(b"PAR1" + b"\0" * size + size.to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("body", [b"\x1c" * 100, b"\x19" * 100, b"\x19\xfc" + b"\xff" * 12, b"\x18\xff\xff\xff\x7f"])
def test_structures_that_never_end_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not Parquet"):
        row_groups(b"PAR1" + body + len(body).to_bytes(4, "little") + b"PAR1")


def test_random_damage_gives_no_other_error() -> None:
    plain = written(5, "NONE")
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(plain)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(4, len(data) - 4)] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            row_groups(bytes(data))
