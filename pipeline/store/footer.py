"""What a Parquet file says of itself, read without a Parquet library: rows and compression of every row group.

pyarrow ends the process when it is asked for a codec that does not exist, so a file from somebody else is asked here
first. The footer is a Thrift structure in the compact protocol, of which this reads all and keeps two fields.
"""

from __future__ import annotations

from typing import Any

MAX_FOOTER_BYTES = 1 << 20
MAX_DEPTH = 16
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
UNCOMPRESSED = CODECS[0]
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def row_groups(data: bytes) -> list[tuple[int, list[str]]]:
    """(rows, codec of each column chunk) of every row group.

    Raises:
        ValueError: no Parquet, or a footer larger than kd's files have.
    """
    size = int.from_bytes(data[-8:-4], "little")
    if data[:4] != b"PAR1" or data[-4:] != b"PAR1" or len(data) < 12 + size:
        raise ValueError("not Parquet: it does not begin and end as such")
    if size > MAX_FOOTER_BYTES:
        raise ValueError(f"its footer has {size} bytes; at most {MAX_FOOTER_BYTES} are expected")
    try:
        metadata = _Thrift(data[-8 - size : -8]).struct(0)
        groups = [(group[3], [column[3][4] for column in group[1]]) for group in metadata[4]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not Parquet: its footer is broken ({type(error).__name__})") from None
    if not all(type(number) is int for rows, codecs in groups for number in (rows, *codecs)):
        raise ValueError("not Parquet: its footer is broken")
    return [(rows, [_name_of(codec) for codec in codecs]) for rows, codecs in groups]


def _name_of(codec: int) -> str:
    return CODECS[codec] if 0 <= codec < len(CODECS) else f"codec {codec}"


class _Thrift:
    """Reads a compact-protocol structure: structs as dicts by field number, lists as lists."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            if number in fields:
                raise ValueError("not Parquet: its footer has a field twice")
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("not Parquet: its footer is nested too deep")
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind in (_DOUBLE, _BINARY):
            return self._skip(8 if kind == _DOUBLE else self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            # Every entry takes a byte at least, so what runs out of bytes ends here.
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)
            return None
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"not Parquet: its footer has a value of kind {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("not Parquet: its footer has a number without an end")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise ValueError("not Parquet: its footer is cut")
