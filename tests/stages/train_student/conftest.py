"""Views with planted signals: every teacher value is a function of the exact tokens of its own row."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.fingerprint import fingerprint

LABELS = ("negative", "neutral", "positive")
NUM_LAYERS, WIDTH = 2, 32


def key_of(ids: Sequence[int], teacher: str) -> float:
    """A number below 1000 that tells rows apart by their token ids, the order of these, and whose store they are in."""
    digest = hashlib.blake2b(f"{teacher} {[int(token) for token in ids]}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48 * 1000


def planted(signal: str, ids: Sequence[int], num_labels: int = 3, teacher: str = "one") -> np.ndarray:
    """What the store of a teacher holds of `signal` for a row of these token ids."""
    name, _, layer = signal.partition("@")
    start = key_of(ids, teacher) + 100 * int(layer or 0)
    if name == "logits":
        return (2 * np.sin(start + np.arange(num_labels))).astype(np.float32)
    if name == "hidden.tok":
        return np.sin(np.asarray(ids)[:, None] + start + np.arange(WIDTH)).astype(np.float16)
    offset = {"hidden.cls": 0.0, "hidden.mean": 0.5}[name]
    return np.sin(start + offset + np.arange(WIDTH)).astype(np.float16)


@pytest.fixture(scope="session", name="planted")
def planted_fixture() -> Callable[..., np.ndarray]:
    """What the store holds of a signal for a row of given token ids."""
    return planted


@dataclass(frozen=True)
class PlantedView:
    """A finished view folder, and what was put into it: all of it JSON-ready but the path.

    `token_ids` are those of the tokenizer alone, example after example.
    """

    path: Path
    texts: list[str]
    second: list[str] | None
    labels: list[Any]
    token_ids: list[list[int]]
    teacher: str


class PlantedRows:
    """Watches a training: does every row meet its own text, label and teacher values?

    Args:
        views: that are trained on, in their order.
        label_names: in the order of the teacher's logits.
        reads_teacher_tokens: whether the student does.
        on_pass: called before every forward pass with its number, from 0.
    """

    def __init__(
        self,
        views: Sequence[PlantedView],
        *,
        label_names: Sequence[str] = LABELS,
        reads_teacher_tokens: bool = True,
        on_pass: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.passes: list[list[int]] = []
        """Rows of every forward pass, numbered over all views."""
        self.signals: set[str] = set()
        self.negatives: list[list[int]] = []
        """Rows that every forward pass is told apart from, where a method draws some."""
        self._examples = [
            (view.teacher, ids, label)
            for view in views
            for ids, label in zip(view.token_ids, view.labels or [None] * len(view.token_ids), strict=True)
        ]
        self._label_names, self._reads_teacher_tokens, self._on_pass = label_names, reads_teacher_tokens, on_pass

    def watch(self, setattr_: Callable[[Any, str, Any], None] = setattr) -> None:
        """Stand between the loader and the loss; `setattr_` of a monkeypatch undoes it."""
        import torch

        from kd.stages.train_student.rows import Rows
        from kd.stages.train_student.trainer import Distillation

        batch, forward = Rows.batch, Distillation.forward

        def numbered(rows: Rows, index_B: np.ndarray) -> dict[str, Any]:
            return {**batch(rows, index_B), "index_B": torch.from_numpy(index_B)}

        def checking(distillation: Distillation, index_B: Any, **given: Any) -> Any:
            self._on_pass(len(self.passes))
            self.check(index_B.tolist(), **given)
            self.passes.append(index_B.tolist())
            return forward(distillation, **given)

        setattr_(Rows, "batch", numbered)
        setattr_(Distillation, "forward", checking)

    def check(
        self, index: list[int], inputs: Any, labels: Any, has_gold: Any, signals: Any, negatives: Any = None
    ) -> None:
        """AssertionError where a row of the batch has something of another row, or a negative is of no row."""
        if negatives:
            self.negatives.append(self._rows_of(negatives))
        assert len(labels) == len(index)
        for row, example in enumerate(index):
            teacher, ids, label = self._examples[example]
            if self._reads_teacher_tokens:
                length = int(inputs["attention_mask"][row].sum())
                assert inputs["input_ids"][row, :length].tolist() == ids, f"example {example}: other tokens"
            assert bool(has_gold[row]) == (label is not None), f"example {example}: gold where there is none"
            assert label is None or self._label_names[int(labels[row])] == label, f"example {example}: another label"
            for name, values in signals.items():
                if name == "family":
                    continue
                found, wanted = values[row].numpy(), planted(name, ids, len(self._label_names), teacher)
                if name.startswith("hidden.tok"):
                    assert not found[len(ids) :].any(), f"example {example}: {name} goes on after its last token"
                    found = found[: len(ids)]
                assert np.array_equal(found, wanted), f"example {example} met {name} of another row"
                self.signals.add(name)

    def _rows_of(self, negatives: Any) -> list[int]:
        """Which examples these signals of rows are of; all of them of the same."""
        found = []
        for name, values in negatives.items():
            if name == "family":
                continue
            rows = {
                planted(name, ids, len(self._label_names), teacher).tobytes(): example
                for example, (teacher, ids, _) in enumerate(self._examples)
            }
            found.append([rows.get(row.numpy().tobytes()) for row in values])
        assert found.count(found[0]) == len(found) and None not in found[0], "negatives are signals of rows"
        return found[0]


@pytest.fixture(scope="session")
def planted_rows() -> type[PlantedRows]:
    """The watcher over planted rows."""
    return PlantedRows


@pytest.fixture(scope="session")
def plant(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PlantedView]:
    """Makes views without running a teacher; no teacher folder exists beside them."""
    from transformers import AutoTokenizer

    from kd.pipeline.store import StoreIdentity, StoreLayout, array_specs, create_or_open, parse_signals, write_view
    from kd.stages.cache_teacher.identity import tokenizer_identity
    from kd.stages.cache_teacher.tokenize import encode
    from kd.stages.corpus import DatasetSource, load_corpus

    files = tmp_path_factory.mktemp("teacher-files")
    for folder, names in (("tokenizer", ("tokenizer.json", "tokenizer_config.json")), ("config", ("config.json",))):
        (files / folder).mkdir()
        for name in names:
            shutil.copy(tiny_teacher / name, files / folder / name)
    tokenizer = AutoTokenizer.from_pretrained(str(files / "tokenizer"))

    def make(
        texts: list[str],
        labels: list[Any] | None = None,
        *,
        second: list[str] | None = None,
        parents: list[int | None] | None = None,
        task: str = "single-label",
        label_names: tuple[str, ...] = LABELS,
        signals: str = "logits,hidden.cls@all,hidden.mean@all,hidden.tok@all",
        sidecars: dict[str, dict[str, np.ndarray]] | None = None,
        teacher: str = "one",
        rows_per_shard: int = 16,
    ) -> PlantedView:
        folder = tmp_path_factory.mktemp("planted")
        columns: dict[str, Any] = {"text": texts, "label": [None] * len(texts) if labels is None else labels}
        if second is not None:
            columns["second"] = second
        pq.write_table(pa.table(columns), folder / "data.parquet")
        source = DatasetSource(
            dataset=str(folder / "data.parquet"),
            text_column="text",
            text_pair_column=None if second is None else "second",
            label_column=None if labels is None else "label",
            task=task,
        )
        corpus = load_corpus(source, label_names=label_names if task == "single-label" else None)
        corpus = corpus.with_label_names(label_names if task != "regression" else (), task=task)
        if parents is not None:
            ids = corpus.table["example_id"].to_pylist()
            column = pa.array([None if p is None else ids[p] for p in parents], pa.binary(16))
            index = corpus.table.schema.get_field_index("parent_id")
            corpus = corpus.replaced(table=corpus.table.set_column(index, "parent_id", column))
        token_ids, segment_ids = encode(tokenizer, *corpus.texts(), 64)
        problem = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        names = label_names if task != "regression" else ("LABEL_0",)
        identity = StoreIdentity(
            teacher={"model_type": "bert", "tensors": teacher},
            tokenizer=tokenizer_identity(tokenizer),
            capture={"max_length": 64, "label_names": names, "problem_type": problem.get(task, "regression")},
        )
        store = create_or_open(
            folder / "store", identity, StoreLayout.for_vocabulary(200, rows_per_shard=rows_per_shard)
        )
        allocation = store.allocate(token_ids, segment_ids)
        specs = store.declare(
            [
                spec
                for signal in parse_signals(signals, NUM_LAYERS)
                for spec in array_specs(signal, len(names) if signal.name == "logits" else WIDTH)
            ]
        )
        for shard in allocation.shards:
            rows = store.read_tokens(shard).token_ids
            writer = store.writer(shard, specs)
            for signal in dict.fromkeys(spec.signal for spec in specs):
                values = [planted(str(signal), row.tolist(), len(names), teacher) for row in rows]
                if signal.kind.axis == "token":
                    writer.put_tokens(signal, np.arange(len(rows)), np.concatenate(values))
                else:
                    writer.put_rows(signal, np.arange(len(rows)), np.stack(values))
            writer.commit()
        for name in ("tokenizer", "config"):
            store.put_file_sidecar(name, files / name)
        for name, tensors in (sidecars or {}).items():
            store.put_sidecar(name, tensors)
        view = folder / "view"
        content = write_view(
            view,
            corpus.table,
            allocation.rows,
            store,
            specs,
            corpus={"info": corpus.info.to_json(), "fingerprint": corpus.fingerprint},
        )
        identity_of_view = {"corpus": corpus.fingerprint, "store": identity.digest}
        write_manifest(
            view,
            {
                "kd_version": "0",
                "kind": "view",
                "stage": "cache-teacher",
                "fingerprint": fingerprint(identity_of_view),
                "identity": identity_of_view,
                "config": {
                    "teacher": "teachers/tiny",
                    "dataset": str(folder / "data.parquet"),
                    "text_column": "text",
                    "store": str(folder / "store"),
                    "signals": signals,
                    "output_dir": str(view),
                },
                "inputs": {},
                "summary": {},
                "content": content,
            },
        )
        pairs = [texts] if second is None else [texts, second]
        cut = tokenizer(*pairs, truncation=True, max_length=64)["input_ids"]
        return PlantedView(view, texts, second, [] if labels is None else labels, cut, teacher)

    return make


@pytest.fixture(scope="session")
def teacher_tensors(tiny_teacher: Path) -> dict[str, dict[str, np.ndarray]]:
    """The sidecars of the tiny teacher: groups of its tensors by their names."""
    from transformers import AutoModelForSequenceClassification

    from kd.stages.cache_teacher.sidecars import SIDECARS, tensors_of

    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_teacher))
    return {group: dict(tensors_of(model, group)) for group in SIDECARS}


@pytest.fixture(scope="session")
def view(
    plant: Callable[..., PlantedView], sentences: list[str], teacher_tensors: dict[str, dict[str, np.ndarray]]
) -> PlantedView:
    """120 single texts, three quarters of them labelled, with every signal and every sidecar."""
    labels = [LABELS[i % 3] if i % 4 else None for i in range(120)]
    return plant(sentences[:120], labels, sidecars=teacher_tensors)


@pytest.fixture(scope="session")
def eval_file(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled dataset of 30 other texts."""
    file = tmp_path_factory.mktemp("eval") / "eval.parquet"
    pq.write_table(pa.table({"text": sentences[150:180], "label": list(LABELS) * 10}), file)
    return file
