"""A capture in one call, and what to compare stores by."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizer

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

    def stage(self, dataset: str | None = None, **options: Any) -> CacheTeacher:
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

    def capture(self, dataset: str | None = None, *, overwrite: bool = False, **options: Any) -> Outcome:
        progress = Messages()
        outcome = execute(self.stage(dataset, **options), StageContext(progress=progress, overwrite=overwrite))
        self.said = progress.texts
        return outcome


@pytest.fixture(autouse=True)
def own_cache(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


@pytest.fixture(scope="session")
def letters() -> type[PreTrainedTokenizer]:
    """A tokenizer written in Python, of single letters: all that can be seen of it is what it does."""

    class Letters(PreTrainedTokenizer):  # type: ignore[misc]
        model_input_names = ("input_ids",)  # type: ignore[assignment]
        between = 1

        @property
        def vocab_size(self) -> int:
            return 300

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(300)}

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return min(ord(token), 299)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

        def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
            return first if second is None else [*first, *[0] * self.between, *second]

    return Letters
