"""Small labelled sets, and teacher and run folders made of a tiny classifier with a little noise on its weights."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.fingerprint import fingerprint

NAMES = ("negative", "neutral", "positive")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: sums are then of one order, and a store of the same bytes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    """`write_rows(path, header, rows)`: a CSV file."""
    return write_csv


@pytest.fixture(scope="session")
def topic_rows(sentences: list[str]) -> list[list[str]]:
    """Sentence and label; the label follows from one word, so that it can be learned."""
    return [[text, "animal" if "cat" in text or "dog" in text else "other"] for text in sentences]


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory, topic_rows: list[list[str]]) -> Path:
    """Folder with train.csv (120 rows) and test.csv (80), columns text and label."""
    folder = tmp_path_factory.mktemp("topics")
    write_csv(folder / "train.csv", ["text", "label"], topic_rows[:120])
    write_csv(folder / "test.csv", ["text", "label"], topic_rows[120:])
    return folder


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, sentences: list[str]) -> Path:
    """CSV of sentences labelled as the tiny teacher says, every tenth one otherwise: the teacher is 90 % right."""
    from kd.stages.predict import load_predictor

    chosen = load_predictor(tiny_teacher).predict(sentences).argmax(1)
    labels = [NAMES[(int(label) + (row % 10 == 0)) % 3] for row, label in enumerate(chosen)]
    path = tmp_path_factory.mktemp("judged") / "judged.csv"
    return write_csv(path, ["text", "label"], list(zip(sentences, labels, strict=True)))


@pytest.fixture(scope="session")
def tagged(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """Folder with train.jsonl (120 rows) and test.jsonl (80), lists `words` and `tags`: who acts, and what on."""
    folder = tmp_path_factory.mktemp("tagged")
    ends = dict.fromkeys(("cat", "dog", "friend", "teacher", "student"), "WHO") | dict.fromkeys(
        ("book", "dinner", "apples", "plot"), "WHAT"
    )
    lines = []
    for text in sentences:
        words = text.replace(",", " ,").split()
        tags = ["O"] * len(words)
        for place, word in enumerate(words):
            if word in ends:
                start = max((n for n in range(place) if words[n] in ("the", "a", "my", "every")), default=place)
                start = start if place - start < 3 else place
                tags[start : place + 1] = [f"B-{ends[word]}", *[f"I-{ends[word]}"] * (place - start)]
        lines.append(json.dumps({"words": words, "tags": tags}))
    (folder / "train.jsonl").write_text("\n".join(lines[:120]))
    (folder / "test.jsonl").write_text("\n".join(lines[120:]))
    return folder


@pytest.fixture
def make_model(tiny_teacher: Path) -> Callable[..., Path]:
    """`make_model(folder, noise=0.1, seed=0, names=None)`: the tiny teacher with noise on its weights.

    `names` gives the order of the labels; logit columns move with their names.
    """

    def make(folder: Path, *, noise: float = 0.0, seed: int = 0, names: Sequence[str] | None = None) -> Path:
        import torch
        from transformers import AutoModelForSequenceClassification

        shutil.copytree(tiny_teacher, folder, dirs_exist_ok=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
            if names is not None:
                order = [NAMES.index(name) for name in names]
                model.classifier.weight.copy_(model.classifier.weight[order].clone())
                model.classifier.bias.copy_(model.classifier.bias[order].clone())
                model.config.id2label = dict(enumerate(names))
                model.config.label2id = {name: index for index, name in enumerate(names)}
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_run(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """`make_run(folder, role=, init=, method=, seed=, steps=, noise=, names=)`: a finished run."""

    def make(
        folder: Path,
        *,
        role: str = "distilled",
        student: str = "bert",
        init: str = "random",
        method: str = "soft-target",
        seed: int = 0,
        steps: int = 100,
        noise: float = 0.05,
        names: Sequence[str] | None = None,
        label_names: Sequence[str] = NAMES,
        task: str = "single-label",
        view: str = "a",
        learning_rate: float = 1e-3,
        validation: float | None = 0.5,
    ) -> Path:
        make_model(folder, noise=noise, seed=seed, names=names)
        config = {"student": student, "init": init, "method": [method], "baseline": role == "baseline", "steps": steps}
        config |= {"learning_rate": learning_rate}
        identity = {"stage": "train-student", "config": {**config, "seed": seed}, "inputs": {"view": view}}
        columns = {"text_column": "text", "text_pair_column": None, "label_column": "label"}
        write_manifest(
            folder,
            {
                "kind": "run",
                "fingerprint": fingerprint(identity),
                "identity": identity,
                "config": {"view": [f"runs/views/{view}"]},
                "summary": {"seconds": 12.0, "rows": 200, "evaluated_on": "held-out rows of the view"},
                "content": {
                    "role": role,
                    "student": student,
                    "init": init,
                    "method": method,
                    "view": [view],
                    "seed": seed,
                    "steps": steps,
                    "task": task,
                    "label_names": list(names or label_names),
                    "columns": columns,
                    "max_length": 48,
                    "metrics": {} if validation is None else {"accuracy": validation},
                    "budget": {"max_steps": steps, "learning_rate": learning_rate},
                },
            },
        )
        return folder

    return make


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, sentences: list[str]) -> Path:
    """Folder of a 2-layer BERT with a masked-LM head, trained for a moment on the sentences."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked-lm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    config = AutoConfig.from_pretrained(tiny_teacher)
    config.id2label, config.label2id, config.problem_type = {}, {}, None
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            chosen = torch.randperm(len(sentences))[:32]
            ids_BT, mask_BT = inputs["input_ids"][chosen], inputs["attention_mask"][chosen]
            masked_BT = (torch.rand(ids_BT.shape) < 0.15) & (ids_BT > 4)
            labels_BT = ids_BT.masked_fill(~masked_BT, -100)
            seen_BT = ids_BT.masked_fill(masked_BT, tokenizer.mask_token_id)
            model(input_ids=seen_BT, attention_mask=mask_BT, labels=labels_BT).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TAGS = ("O", "B-THING", "I-THING")


@pytest.fixture(scope="session")
def token_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """Folder of a seeded 2-layer BERT that tags tokens with `TAGS`."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertForTokenClassification

    folder = tmp_path_factory.mktemp("token-teacher")
    config = AutoConfig.from_pretrained(tiny_teacher)
    config.id2label, config.problem_type = dict(enumerate(TAGS)), None
    config.label2id = {name: index for index, name in enumerate(TAGS)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertForTokenClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tagged_rows(sentences: list[str]) -> list[tuple[list[str], list[str]]]:
    """Sixty sentences as words with a tag each, which follows from it; some words have several pieces, some none."""
    rows = []
    for row, sentence in enumerate(sentences[:60]):
        words = sentence.split()
        words[row % len(words) : row % len(words)] = [("zebra", "don't", "\u200b")[row % 3]] if row % 2 else []
        words += ["a", "very", "long", "tail", "of", "words"] if row % 5 == 0 else []
        things = [word in ("book", "zebra", "film", "don't", "dinner", "stars") for word in words]
        before = [False, *things[:-1]]
        rows.append((words, [TAGS[thing + (thing and old)] for thing, old in zip(things, before, strict=True)]))
    return rows


@pytest.fixture(scope="session")
def write_tagged() -> Callable[..., Path]:
    """`write_tagged(path, rows)`: a Parquet file of words and tags; tags may be None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(path: Path, rows: Sequence[tuple[list[str], list[str] | None]]) -> Path:
        words, tags = ([row[side] for row in rows] for side in (0, 1))
        kind = pa.list_(pa.string())
        pq.write_table(pa.table({"words": pa.array(words, kind), "tags": pa.array(tags, kind)}), path)
        return path

    return write
