"""Corpora: labelled or unlabelled text in one schema, read from any usual source, written where `datasets` opens it.

`DatasetSource` is light and may be imported by stage definitions; the rest needs pyarrow and is imported on demand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .source import DatasetSource

if TYPE_CHECKING:
    from .corpus import Corpus, load_corpus, open_corpus, write_corpus
    from .labels import hide_labels
    from .schema import CorpusInfo, example_ids

_HOMES = {
    "Corpus": "corpus",
    "load_corpus": "corpus",
    "open_corpus": "corpus",
    "write_corpus": "corpus",
    "hide_labels": "labels",
    "CorpusInfo": "schema",
    "example_ids": "schema",
}

__all__ = [
    "Corpus",
    "CorpusInfo",
    "DatasetSource",
    "example_ids",
    "hide_labels",
    "load_corpus",
    "open_corpus",
    "write_corpus",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
