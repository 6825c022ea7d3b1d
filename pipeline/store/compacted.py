"""Compacted records: many commit records in one Parquet file, each with its name and its exact bytes.

The file's name carries the digest of its bytes, as a record's does. It may come from anyone: what it says about
its own size is checked before it is decoded, and nothing in it can grow, since it is neither compressed nor may
it repeat a value.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from .arrow import bytes_to_arrow, no_memory_kept
from .footer import UNCOMPRESSED, row_groups
from .layout import COMMITS

COMPACTED_NAME = re.compile(r"([0-9a-f]{32})\.parquet")
MAX_RECORDS = 1 << 16
"""In one file; further ones go into the next."""
MAX_RECORD_SUM = 32 << 20
"""Bytes of the records of one file together. A reader takes twice that, for names and pages."""
MAX_RECORD_BYTES = 1 << 20
"""Of one record, compacted or not."""
PAGE_BYTES = 1 << 14

PARQUET_ERRORS = (pa.ArrowException, OSError, RuntimeError, LookupError, TypeError, ArithmeticError)
"""What pyarrow raises, besides ValueError, on bytes that are no Parquet or say impossible things of themselves."""

SCHEMA = pa.schema([pa.field("name", pa.string(), nullable=False), pa.field("record", pa.binary(), nullable=False)])


def compacted_file(data: bytes) -> str:
    """Path inside the store of the compacted records with these bytes."""
    return f"{COMMITS}/{digest_of(data)}.parquet"


def digest_of(data: bytes) -> str:
    """BLAKE2b-128 of bytes, 32 hex: what the names of records and of compacted records carry."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def encode_compacted(records: Mapping[str, bytes]) -> bytes:
    """A Parquet file of records by name; the same bytes for the same records, whatever their order."""
    names = sorted(records)
    columns = [
        bytes_to_arrow([name.encode() for name in names], pa.string()),
        bytes_to_arrow([records[name] for name in names], pa.binary()),
    ]
    table = pa.table(columns, schema=SCHEMA)
    buffer = io.BytesIO()
    # Uncompressed and plain, so that no page can unfold to more than the file's own size. Arrow takes several times the
    # size of a page, however few pages there are, and keeps it until it is told.
    pq.write_table(
        table,
        buffer,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=MAX_RECORDS,
        data_page_size=PAGE_BYTES,
        store_schema=False,
    )
    pa.default_memory_pool().release_unused()
    return buffer.getvalue()


def decode_compacted(data: bytes, *, name: str) -> dict[str, bytes]:
    """The records of a compacted file by name, in order; that they are records is for the caller to check.

    Args:
        name: of the file in `commits/`; the digest in it must be that of `data`.

    Raises:
        ValueError: says what is wrong with it.
    """
    match = COMPACTED_NAME.fullmatch(name)
    if match is None:
        raise ValueError("the name is not that of compacted records")
    if digest_of(data) != match[1]:
        raise ValueError("its bytes do not have the digest in its name: it was edited or damaged")
    try:
        with no_memory_kept():
            names, records = _decode_columns(data)
    except PARQUET_ERRORS as error:
        raise ValueError(f"not Parquet: {error}") from None
    if len({*names}) != len(names):
        raise ValueError("it holds a record twice")
    return dict(zip(names, records, strict=True))


def _decode_columns(data: bytes) -> tuple[list[str], list[bytes]]:
    metadata = pq.read_metadata(pa.BufferReader(data))
    if metadata.num_rows > MAX_RECORDS or metadata.num_row_groups > 1:
        raise ValueError(f"it says it has {metadata.num_rows} records in {metadata.num_row_groups} row groups")
    found = [(column.path, column.physical_type, column.max_definition_level) for column in metadata.schema]
    if found != [("name", "BYTE_ARRAY", 0), ("record", "BYTE_ARRAY", 0)]:
        raise ValueError(f"its columns are {', '.join(name for name, *_ in found)}, expected name and record")
    for _, codecs in row_groups(data):
        if compressed := [codec for codec in codecs if codec != UNCOMPRESSED]:
            raise ValueError(f"it is compressed with {compressed[0]}")
    # As dictionaries: a value that a hostile file repeats a million times is then kept once, and found out.
    parquet = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=SCHEMA.names)
    table = parquet.read(use_threads=False)
    names, records = (_values(table.column(column)) for column in SCHEMA.names)
    if not len(names) == len(records) == metadata.num_rows:
        raise ValueError(f"it has {len(names)} names and {len(records)} records, and says {metadata.num_rows}")
    if sum(map(len, records)) > MAX_RECORD_SUM or any(len(record) > MAX_RECORD_BYTES for record in records):
        raise ValueError(f"it holds more than {MAX_RECORD_SUM} bytes of records, or one above {MAX_RECORD_BYTES}")
    return [_text(value) for value in names], records


def _values(column: pa.ChunkedArray) -> list[bytes]:
    values: list[bytes] = []
    for chunk in column.chunks:
        if chunk.null_count or len(chunk.dictionary) != len(chunk):
            raise ValueError("it repeats a value")
        if chunk.indices.to_pylist() != [*range(len(chunk))]:
            raise ValueError("its values are out of order")
        # A view, not a cast, which would import all of pyarrow.compute: a tenth of a second.
        values += chunk.dictionary.view(pa.binary()).to_pylist()
    return values


def _text(value: bytes) -> str:
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError("the name of a record is not plain text") from None
