"""A capture in one call, and what to compare stores by."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.pipeline.stage import NullProgress, Outcome, StageContext, execute
from kd.stages.cache_teacher import CacheTeacher

NAMES = ("negative", "neutral", "positive")


class Messages(NullProgress):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def info(self, text: str, **fields: Any) -> None:
        self.texts.append(text)

    warn = estimate = info


@dataclass
class Bench:
    """A folder with corpora, a store and views, and one call that captures.

    Attributes:
        said: what the last capture said.
    """

    folder: Path
    teacher: Path
    said: list[str] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def corpus(self, texts: Sequence[str], name: str = "corpus", labels: Sequence[str] = NAMES) -> str:
        """A csv of texts; their labels go round."""
        file = self.folder / f"{name}.csv"
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows([text, labels[row % len(labels)]] for row, text in enumerate(texts))
        return str(file)

    def stage(self, dataset: str, **options: Any) -> CacheTeacher:
        options = {
            "teacher": str(self.teacher),
            "text_column": "text",
            "label_column": "label",
            "store": str(self.store),
            "output_dir": str(self.folder / "view"),
            "rows_per_shard": 64,
            "max_length": 64,
        } | options
        return CacheTeacher(dataset=dataset, **options)

    def capture(self, dataset: str, *, overwrite: bool = False, **options: Any) -> Outcome:
        progress = Messages()
        outcome = execute(self.stage(dataset, **options), StageContext(progress=progress, overwrite=overwrite))
        self.said = progress.texts
        return outcome


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path: Path, tiny_teacher: Path) -> Bench:
    return Bench(tmp_path, tiny_teacher)


def files_of(store: Path) -> dict[str, str]:
    """SHA-256 of every file of a store, by name; the lock and where its views are, are not its content."""
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file() and file.name != ".lock" and file.parent.name != "views"
    }


@pytest.fixture
def files() -> Callable[[Path], dict[str, str]]:
    return files_of


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass of a BERT classifier in this process."""
    from transformers import BertForSequenceClassification

    seen: list[int] = []
    original = BertForSequenceClassification.forward

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        seen.append(len(input_ids))
        return original(self, input_ids=input_ids, **kwargs)

    forward.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    return seen


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a teacher's weights fails the test."""
    from kd.stages.cache_teacher import teacher

    monkeypatch.setattr(teacher, "_load", lambda *args: pytest.fail("the weights were loaded"))
