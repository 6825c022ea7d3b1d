"""Token tasks: a text that is a list of words, and a label that is a list of tags, one per word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import offsets_of
from .labels import Labels, numeric_first
from .schema import NO_LABEL

MOST_TAGS = 1 << 15
"""Tags are kept as int16."""


def holds_words(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of words; so does one of nothing but empty lists.

    >>> holds_words(pa.list_(pa.string())), holds_words(pa.string()), holds_words(pa.list_(pa.int64()))
    (True, False, False)
    """
    inner = _inner(kind)
    return inner is not None and (_is_text(inner) or pa.types.is_null(inner))


def read_words(column: pa.ChunkedArray, *, name: str, where: str) -> list[str | None]:
    """The words of every row, joined by one space; "" for no words, None for null.

    `text.split(" ")` gives the words again: none is empty or holds a space.

    Args:
        column: of a type that `holds_words`, or null.
        name: the column, for errors.
        where: the dataset, for errors.

    Raises:
        RefusedError: a word that is null, empty or holds a space, with its row.
    """
    if pa.types.is_null(column.type):
        return [None] * len(column)
    lists = column.cast(pa.list_(pa.string())).combine_chunks()
    words = lists.flatten()
    texts = {"null": words.is_null(), "''": pc.equal(words, ""), "a space": pc.match_substring(words, " ")}
    for found, is_bad in texts.items():
        at = np.flatnonzero(pc.fill_null(is_bad, False).to_numpy(zero_copy_only=False))
        if len(at):
            row, place = _place(lists, int(at[0]))
            shown = f"{words[int(at[0])].as_py()!r}, which holds a space," if found == "a space" else found
            raise RefusedError(
                f"column {name!r} of dataset {where} holds {shown} as word {place} of row {row}",
                details=[f"the row: {lists[row].as_py()!r:.200}", f"{len(at)} such words in all"],
                fix="split it into words with a tag each"
                if found == "a space"
                else "leave such words and their tags out",
            )
    return pc.binary_join(lists, " ").to_pylist()  # type: ignore[no-any-return]


def read_tags(
    column: pa.ChunkedArray, texts: Sequence[str | None], *, name: str, where: str, class_names: Sequence[str] | None
) -> Labels:
    """One tag per word of every row.

    Strings are tag names, sorted. Integers take their names from `class_names` (the ClassLabel feature of `datasets`),
    else they are their own names from 0 up. A null row has no tags; nor has one of nothing but -1.

    Args:
        column: the lists of tags.
        texts: what `read_words` gave; tags of a row without words do not count.
        name: the column, for errors.
        where: the dataset, for errors.
        class_names: of integers.

    Raises:
        RefusedError: a column that holds no lists of names or integers, another number of tags than words, a null or
            empty tag, a number that is none of a tag.
    """
    kind, inner = column.type, _inner(column.type)
    if pa.types.is_null(kind):
        return Labels("token", [None] * len(column), tuple(class_names or ()))
    if inner is None or not (_is_text(inner) or pa.types.is_integer(inner) or pa.types.is_null(inner)):
        raise RefusedError(
            f"label column {name!r} of dataset {where} holds {kind}; words need a list of tags, one for each",
            details=["a tag is a name or an integer"],
            fix="give the column of the tags as --label-column, or join the words if a row has one label",
        )
    is_named = not pa.types.is_integer(inner)
    lists = column.cast(pa.list_(pa.string() if is_named else pa.int64())).combine_chunks()
    lengths = _lengths(lists)
    is_null = lists.is_null().to_numpy(zero_copy_only=False)
    num_words = np.array([len(text.split(" ")) if text else 0 for text in texts], np.int64)
    wrong = np.flatnonzero(~is_null & (lengths != num_words) & np.array([text is not None for text in texts], bool))
    if len(wrong):
        row = int(wrong[0])
        raise RefusedError(
            f"row {row} of dataset {where} has {num_words[row]} words and {lengths[row]} tags in column {name!r}",
            details=[
                f"its words: {texts[row]!r:.200}",
                f"its tags:  {lists[row].as_py()!r:.200}",
                f"{len(wrong)} such rows in all",
            ],
            fix="give every word one tag",
        )
    tags = lists.flatten()
    bad = np.flatnonzero(pc.fill_null(pc.equal(tags, ""), False)) if is_named else np.empty(0, np.int64)
    bad = np.union1d(np.flatnonzero(tags.is_null()), bad)
    if len(bad):
        raise _bad_tag(lists, tags, int(bad[0]), name, where, "expected a name" if is_named else "expected a number")
    if is_named:
        names = tuple(sorted(tags.unique().to_pylist(), key=numeric_first))
        numbers = pc.index_in(tags, pa.array(names, pa.string())).to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        numbers = tags.to_numpy()
        row_of = np.repeat(np.arange(len(lists)), lengths)
        not_published = np.bincount(row_of[numbers == NO_LABEL], minlength=len(lists)) == lengths
        is_null |= not_published & (lengths > 0)
        counted = ~is_null[row_of]
        limit = MOST_TAGS if class_names is None else len(class_names)
        bad = np.flatnonzero(counted & ((numbers < 0) | (numbers >= limit)))
        if len(bad):
            expected = f"expected a number from 0 to {limit - 1}"
            raise _bad_tag(lists, tags, int(bad[0]), name, where, expected)
        names = tuple(class_names or map(str, range(int(numbers[counted].max(initial=-1)) + 1)))
    if len(names) > MOST_TAGS:
        raise RefusedError(f"label column {name!r} of dataset {where} holds {len(names)} different tags")
    ends = offsets_of(lengths)
    values = [None if is_null[row] else numbers[ends[row] : ends[row + 1]].tolist() for row in range(len(lists))]
    return Labels("token", values, names)


def _bad_tag(lists: pa.ListArray, tags: pa.Array, at: int, name: str, where: str, expected: str) -> RefusedError:
    row, place = _place(lists, at)
    return RefusedError(
        f"label column {name!r} of dataset {where} holds {tags[at].as_py()!r} as tag {place} of row {row}; {expected}",
        details=[f"its tags: {lists[row].as_py()!r:.200}"],
        fix="give every word a tag of its own (pieces that are not scored are kd's business)",
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _inner(kind: pa.DataType) -> pa.DataType | None:
    """What the lists of a column hold; None where it holds no lists."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return None
    inner = kind.value_type
    return inner.value_type if pa.types.is_dictionary(inner) else inner


def _lengths(lists: pa.ListArray) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = pc.fill_null(lists.value_lengths(), 0).to_numpy().astype(np.int64)
    return lengths


def _place(lists: pa.ListArray, at: int) -> tuple[int, int]:
    """Row, and place in it, of an item of the lists one after another."""
    ends = offsets_of(_lengths(lists))
    row = int(np.searchsorted(ends, at, side="right")) - 1
    return row, at - int(ends[row])
