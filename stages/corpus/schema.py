"""The columns of a corpus and what identifies an example."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from ...pipeline.errors import RefusedError
from .source import TASKS

EXAMPLE_ID_BYTES = 16
NO_LABEL = -1
"""What `Corpus.labels` holds where a class is not known, and what data sets publish in its place."""

_TEXT_COLUMNS = (
    ("example_id", pa.binary(EXAMPLE_ID_BYTES)),
    ("parent_id", pa.binary(EXAMPLE_ID_BYTES)),
    ("task", pa.dictionary(pa.int32(), pa.string())),
    ("split", pa.dictionary(pa.int32(), pa.string())),
    ("text_a", pa.string()),
    ("text_b", pa.string()),
)
_LABEL_COLUMN = {
    "single-label": ("label_gold", pa.int32()),
    "regression": ("label_score", pa.float32()),
    "multi-label": ("labels", pa.list_(pa.int8())),
    "token": ("tags", pa.list_(pa.int16())),
}
_PROVENANCE_COLUMNS = (
    ("has_gold", pa.bool_()),
    ("aug_op", pa.dictionary(pa.int32(), pa.string())),
    ("aug_iter", pa.int16()),
    ("aug_side", pa.dictionary(pa.int32(), pa.string())),
    ("aug_version", pa.dictionary(pa.int32(), pa.string())),
    ("aug_config_hash", pa.binary(8)),
    ("seed", pa.int64()),
    ("n_words_a", pa.int32()),
    ("n_words_b", pa.int32()),
    ("source", pa.dictionary(pa.int32(), pa.string())),
)
EDITS_FIELD = pa.field("aug_edits", pa.list_(pa.struct([("side", pa.int8()), ("pos", pa.int32()), ("op", pa.int8())])))
"""Which words of its original a variant was changed at: a column that a corpus has if it was asked for."""


@dataclass(frozen=True)
class CorpusInfo:
    """What the rows of a corpus mean.

    Attributes:
        task: one of `TASKS`.
        label_names: class names (tags for a token task), in the order of the label's integers; () for regression and
            for unlabelled text.
        text_column, text_pair_column, label_column: where the rows came from; None where there is no such column.
    """

    task: str
    label_names: tuple[str, ...]
    text_column: str
    text_pair_column: str | None = None
    label_column: str | None = None

    @property
    def is_pair(self) -> bool:
        """Whether a row is two texts."""
        return self.text_pair_column is not None

    def to_json(self) -> dict[str, Any]:
        """As a JSON-ready dict; `from_json` reads it."""
        return asdict(self) | {"label_names": list(self.label_names)}

    @classmethod
    def from_json(cls, fields: Any) -> CorpusInfo:
        """The info that `to_json` wrote; RefusedError for anything else, since a manifest may be anybody's."""
        try:
            info = cls(**{**fields, "label_names": tuple(fields["label_names"])})
        except (TypeError, KeyError):
            info = None
        columns = () if info is None else (info.text_column, info.text_pair_column, info.label_column)
        if (
            info is None
            or not all(isinstance(text, str) for text in (*info.label_names, info.text_column))
            or not all(isinstance(text, str | None) for text in columns)
            or info.task not in (*_LABEL_COLUMN,)
        ):
            raise RefusedError(f"a manifest says of its rows what no corpus says: {fields!r:.200}", fix="make it again")
        return info


def label_field(task: str) -> str:
    """The column that holds the gold label of a task."""
    return _LABEL_COLUMN[task][0]


def schema(task: str, *, edits: bool = False) -> pa.Schema:
    """The Arrow schema of a corpus of this task.

    Key columns: `example_id` (see `example_ids`); `parent_id`, the example a variant was made from, null for
    originals; the gold label, null where there is none: `label_gold` (int32, index into the label names),
    `label_score` (float32), `labels` (list<int8>, one 0 or 1 per class) or `tags` (list<int16>, one index into the
    label names per word). The words of a token task are `text_a.split(" ")`. `aug_op` is "orig" or how the row was
    made; the other `aug_*` columns, `seed` and the word counts are null for rows that no augmentation has seen.

    Args:
        edits: with `aug_edits`, which says of a variant at which words of its original (`side` 0 or 1, `pos` from 0) it
            was changed, and by which operator (`op`, index into the names in the manifest of the corpus); -1 where an
            operator acts on a whole text, or on both.
    """
    assert task in TASKS, task
    return pa.schema([*_TEXT_COLUMNS, _LABEL_COLUMN[task], *_PROVENANCE_COLUMNS, *([EDITS_FIELD] if edits else [])])


def normalised(text: str) -> str:
    """The text as it counts for identity: Unicode NFC."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def example_id(text_a: str, text_b: str | None = None, duplicate: int = 0) -> bytes:
    """16 bytes that name an example: BLAKE2b-128 of a tag, its NFC texts and how many equal examples came before it.

    The length of the first text is part of it, so that no two pairs write the same bytes. Labels are not: the same
    text has the same id in every task, file and command, so a choice made by id (which labels are kept, say) is the
    same everywhere.
    """
    return _named(_identity(text_a, text_b), duplicate)


def example_ids(texts_a: Sequence[str], texts_b: Sequence[str] | None = None) -> tuple[list[bytes], list[int]]:
    """`(ids, dup_index)` of rows in order: the `example_id` of each, and how many equal rows came before it.

    >>> ids, duplicates = example_ids(["a film", "a book", "a film"])
    >>> len(set(ids)), duplicates
    (3, [0, 0, 1])
    """
    seen: dict[bytes, int] = {}
    ids, duplicates = [], []
    for i, text in enumerate(texts_a):
        identity = _identity(text, None if texts_b is None else texts_b[i])
        duplicate = seen.get(identity, 0)
        seen[identity] = duplicate + 1
        duplicates.append(duplicate)
        ids.append(_named(identity, duplicate))
    return ids, duplicates


def _identity(text_a: str, text_b: str | None) -> bytes:
    first = normalised(text_a).encode()
    second = b"" if text_b is None else b"\x1f" + normalised(text_b).encode()
    return b"kd-example-1\x1f%d\x1f%s%s\x1f" % (len(first), first, second)


def _named(identity: bytes, duplicate: int) -> bytes:
    return blake2b(identity + b"%d" % duplicate, digest_size=EXAMPLE_ID_BYTES).digest()
