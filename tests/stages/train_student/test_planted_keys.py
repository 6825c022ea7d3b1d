"""Every stored teacher value is planted: a function of its row's tokens and of the store. A watcher between loader and
loss recomputes it for every row of every forward pass, from the example that the row belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kd
from kd.pipeline.progress import MUTED
from kd.pipeline.stage import execute
from kd.pipeline.store import open_store, open_view
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.rows import StoreRows

SMALL = "bilstm:hidden_size=6:head_size=8:dropout=0"
METHODS = ("soft-target", "fitnets:layer_map=1-2", "hard:0.3")
LABELS = ("negative", "neutral", "positive")
Views = Sequence[Any]


def stage(views: Views, output: Path, **fields: Any) -> TrainStudent:
    values: dict[str, Any] = {
        "view": tuple(str(view.path) for view in views),
        "student": SMALL,
        "method": METHODS,
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2.0,
        "logging_steps": 1,
        "save_steps": 4,
        **fields,
    }
    return TrainStudent(**values)


@pytest.fixture
def watched(
    planted_rows: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Trains on views with every row watched: the watcher, and the summary."""

    def run(views: Views, *, watcher: dict[str, Any] | None = None, **fields: Any) -> tuple[Any, dict[str, Any]]:
        rows = planted_rows(views, **(watcher or {}))
        with monkeypatch.context() as patched:
            rows.watch(patched.setattr)
            outcome = execute(stage(views, tmp_path / "run", **fields))
        return rows, dict(outcome.summary)

    return run


@pytest.fixture(scope="module")
def overlapping(plant: Callable[..., Any], sentences: list[str], view: Any) -> tuple[Any, Any]:
    """Two views of two teachers; half of the second one's examples are the first one's, ids included."""
    labels = [LABELS[i % 3] if i % 4 else None for i in range(60, 140)]
    other = plant(sentences[60:140], labels, teacher="two")
    ids = [set(open_view(made.path).examples["example_id"].to_pylist()) for made in (view, other)]
    assert len(ids[0] & ids[1]) == 60
    return view, other


def test_shuffled_over_epochs_in_buckets_of_length(view: Any, watched: Callable[..., Any]) -> None:
    rows, summary = watched([view], num_train_epochs=3.0)
    assert len(rows.passes) == summary["steps"] == 45 and rows.signals == {"logits", "hidden.tok@2"}
    for epoch in range(3):
        assert sorted(chain(*rows.passes[15 * epoch : 15 * epoch + 15])) == list(range(120))
    assert rows.passes[:15] != rows.passes[15:30]
    spread = [np.ptp([len(view.token_ids[row]) for row in batch]) for batch in rows.passes]
    assert np.mean(spread) < 3, "rows of a batch are not of similar length"


@pytest.mark.parametrize("workers", [0, 3])
def test_with_accumulated_passes_gathered_ahead_by_any_number_of_threads(
    view: Any, watched: Callable[..., Any], workers: int
) -> None:
    rows, summary = watched(
        [view], per_device_train_batch_size=4, gradient_accumulation_steps=2, dataloader_num_workers=workers
    )
    assert len(rows.passes) == 2 * summary["steps"] == 60


def test_rows_that_fill_no_last_batch(view: Any, watched: Callable[..., Any]) -> None:
    rows, summary = watched([view], per_device_train_batch_size=32)
    assert summary["steps"] == 6 and all(len(batch) == 32 for batch in rows.passes)
    assert 96 < len(set(chain(*rows.passes))) <= 120, "the rows left over are others in each epoch"


def test_two_stores_at_once_with_overlapping_examples(
    overlapping: tuple[Any, Any], watched: Callable[..., Any]
) -> None:
    rows, summary = watched(overlapping)
    assert summary["rows"] == 200 and summary["steps"] == 50
    mixed = [batch for batch in rows.passes if min(batch) < 120 <= max(batch)]
    assert len(mixed) > 40, "batches of rows of both stores"


def test_augmented_rows_without_gold_and_texts_that_share_a_row(
    plant: Callable[..., Any], sentences: list[str], watched: Callable[..., Any]
) -> None:
    texts = [*sentences[:30], *sentences[100:130], *sentences[:10], *sentences[100:110]]
    labels = [
        *(LABELS[i % 3] for i in range(30)),
        *[None] * 30,
        *(LABELS[(i + 1) % 3] for i in range(10)),
        *[None] * 10,
    ]
    parents = [*[None] * 30, *range(30), *[None] * 10, *range(10)]
    made = plant(texts, labels, parents=parents, rows_per_shard=8)
    stored = open_view(made.path).rows
    assert len(stored) == 80 and len(set(stored.tolist())) == 60
    rows, summary = watched([made], init="random")
    assert summary["rows"] == 80 and summary["rows_with_gold"] == 40
    assert set(chain(*rows.passes)) == set(range(80))


def test_signals_of_every_token_of_rows_that_were_cut(
    plant: Callable[..., Any], sentences: list[str], watched: Callable[..., Any]
) -> None:
    texts = [" ".join(sentences[i : i + 1 + i % 9]) for i in range(64)]
    made = plant(texts, [LABELS[i % 3] for i in range(64)])
    lengths = [len(ids) for ids in made.token_ids]
    assert lengths.count(64) > 10 and min(lengths) < 20
    rows, _ = watched([made], init="random", method=("fitnets:layer_map=1-1+1-2", "logit-mse"))
    assert rows.signals == {"logits", "hidden.tok@1", "hidden.tok@2"} and set(chain(*rows.passes)) == set(range(64))


def test_students_with_a_vocabulary_of_their_own(overlapping: tuple[Any, Any], watched: Callable[..., Any]) -> None:
    rows, _ = watched(
        overlapping,
        watcher={"reads_teacher_tokens": False},
        student=f"{SMALL}:units=words",
        init="random",
        method=("soft-target", "fitnets:at=cls:layer_map=1-2", "hard:0.3"),
    )
    assert rows.signals == {"logits", "hidden.cls@2"}


@pytest.mark.parametrize("mutation", ["rows", "tokens", "store", "labels"])
def test_a_row_that_meets_another_rows_values_is_noticed(
    overlapping: tuple[Any, Any], watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    """The check can fail: a gather that is off by one row, or by one store, does not pass."""
    from kd.pipeline.store.signal import TOKEN_IDS
    from kd.stages.train_student.rows import Rows

    gather, gather_padded, batch = StoreRows.gather, StoreRows.gather_padded, Rows.batch
    if mutation == "rows":
        monkeypatch.setattr(StoreRows, "gather", lambda self, signal, index: gather(self, signal, (index + 1) % 200))
    elif mutation == "tokens":

        def shifted(self: StoreRows, signal: Any, index: np.ndarray) -> Any:
            values, lengths = gather_padded(self, signal, index)
            return (values if signal in (TOKEN_IDS,) else np.roll(values, 1, axis=0)), lengths

        monkeypatch.setattr(StoreRows, "gather_padded", shifted)
    elif mutation == "store":
        there = open_view(overlapping[1].path)
        own = open_view(overlapping[0].path)
        same = np.flatnonzero(np.isin(own.examples["example_id"].to_pylist(), there.examples["example_id"].to_pylist()))
        assert len(same) == 60  # of one text, in two stores

        def of_the_other(self: StoreRows, signal: Any, index: np.ndarray) -> np.ndarray:
            return gather(self, signal, np.where((index >= 60) & (index < 120), index + 60, index))

        monkeypatch.setattr(StoreRows, "gather", of_the_other)
    else:

        def mislabelled(self: Rows, index: np.ndarray) -> Any:
            found = batch(self, index)
            return {**found, "labels": found["labels"].roll(1)}

        monkeypatch.setattr(Rows, "batch", mislabelled)
    with pytest.raises(AssertionError, match=r"another (row|label)|goes on after its last token"):
        watched(overlapping)


def test_a_store_that_is_captured_further_meanwhile_changes_nothing(view: Any, watched: Callable[..., Any]) -> None:
    from kd.pipeline.ragged import Ragged

    store = open_store(open_view(view.path).store.url)
    known = open_view(view.path).rows

    def grow(number: int) -> None:
        if number % 6:
            return
        fresh = Ragged.from_lengths(np.full(6, 7 + number % 90) + np.arange(6) * (number % 7 + 1), np.array([6]))
        store.allocate(fresh)

    shards = store.catalogue().num_shards
    rows, _ = watched([view], watcher={"on_pass": grow})
    assert store.catalogue().num_shards == shards + 5
    assert len(rows.passes) == 30 and np.array_equal(open_view(view.path).rows, known)


# --- several processes, and kill -9 ------------------------------------------------------------------------------

RECIPE = """
phases:
  - {name: hint, method: "fitnets:layer_map=1-2", share: 0.4, trainable: [embeddings, layers<=1, projections]}
  - {name: kd, method: "soft-target,hard:0.3", share: 0.6, unfreeze_every: 3}
"""
SCRIPT = Path(__file__).with_name("planted_runs.py")


@pytest.fixture(scope="module")
def launched(
    overlapping: tuple[Any, Any], masked_lm: Path, write_rows: Callable[..., Path], sentences: list[str],
    token_teacher: Path, write_tagged: Callable[..., Path], tagged_rows: Any,
    tmp_path_factory: pytest.TempPathFactory, warm_python: str,
) -> Callable[[str], Any]:  # fmt: skip
    """Trainings in processes of their own, by one or two ranks, some killed by SIGKILL on the way."""
    folder = tmp_path_factory.mktemp("ranks")
    both = {"gradient_accumulation_steps": 1, "num_train_epochs": 1.5}
    alone = {**both, "gradient_accumulation_steps": 2}
    deep = {**both, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    (folder / "recipe.yaml").write_text(RECIPE)
    phases = {**both, "method": [], "recipe": str(folder / "recipe.yaml")}
    codir = "codir:size=4:negatives=5"
    # With this seed the two epochs draw different layers.
    drawing = {"method": ["soft-target", "rail-kd:size=4:final=true", codir, f"{codir}:form=nce"], "seed": 1}
    kd.cache_teacher(
        teacher=str(masked_lm), mask_share=0.15, for_=("distilbert",), text_column="text", max_length=64,
        dataset=str(write_rows(folder / "text.csv", ["text"], [[text] for text in sentences[:40]])),
        store=str(folder / "store"), output_dir=str(folder / "masked"),
    )  # fmt: skip
    masked = {
        "view": str(folder / "masked"),
        "student": "bert:num_layers=1:hidden_size=16:heads=4:dropout=0",
        "method": ["soft-target:5:temperature=2", "hard:2", "distilbert:1"],
        "max_steps": 4,
    }
    kd.cache_teacher(
        teacher=str(token_teacher), text_column="words", label_column="tags", max_length=12,
        dataset=str(write_tagged(folder / "tagged.parquet", tagged_rows[:60])),
        store=str(folder / "of-words"), output_dir=str(folder / "words"),
    )  # fmt: skip
    words = {
        "view": str(folder / "words"),
        "student": "bilstm:hidden_size=4:dropout=0",
        "method": ["soft-target:1", "hard:1"],
        "validation_fraction": 0.4,
        "max_steps": 4,
    }
    runs = [
        {"name": "phases-one", "ranks": 1, "output": "phases-one", "fields": {**phases, **alone}},
        {"name": "phases-two", "ranks": 2, "output": "phases-two", "fields": phases},
        {"name": "phases-killed", "ranks": 2, "output": "phases-killed", "fields": phases, "kill": [1, 12]},
        {"name": "phases-resumed", "ranks": 2, "output": "phases-killed", "fields": phases},
        {"name": "one", "ranks": 1, "output": "one", "fields": alone},
        {"name": "wide", "ranks": 1, "output": "wide", "fields": {**both, "per_device_train_batch_size": 16}},
        {"name": "two", "ranks": 2, "output": "two", "fields": both},
        {"name": "deep", "ranks": 2, "output": "deep", "fields": deep},
        {"name": "killed", "ranks": 2, "output": "killed", "fields": both, "kill": [1, 6]},
        {"name": "resumed", "ranks": 2, "output": "killed", "fields": both},
        {"name": "killed-0", "ranks": 2, "output": "killed-0", "fields": both, "kill": [0, 14]},
        {"name": "resumed-alone", "ranks": 1, "output": "killed-0", "fields": alone},
        {"name": "killed-alone", "ranks": 1, "output": "killed-alone", "fields": alone, "kill": [0, 13]},
        {"name": "resumed-by-two", "ranks": 2, "output": "killed-alone", "fields": both},
        {"name": "interrupted", "ranks": 2, "output": "interrupted", "fields": both, "interrupt": [1, 5]},
        {"name": "continued", "ranks": 2, "output": "interrupted", "fields": both},
        {"name": "again", "ranks": 2, "output": "two", "fields": both},
        {"name": "refused", "ranks": 2, "output": "two", "fields": {**both, "learning_rate": 0.5}},
        {"name": "diverged", "ranks": 2, "output": "diverged", "fields": {**both, "learning_rate": 1e30}},
        {"name": "shifted", "ranks": 2, "output": "shifted", "fields": both, "shift": True},
        {"name": "drawing-one", "ranks": 1, "output": "drawing-one", "fields": {**alone, **drawing}},
        {"name": "drawing-two", "ranks": 2, "output": "drawing-two", "fields": {**both, **drawing}},
        {"name": "masked-one", "ranks": 1, "output": "masked-one", "fields": {**alone, **masked}, "unwatched": True},
        {"name": "masked-two", "ranks": 2, "output": "masked-two", "fields": {**both, **masked}, "unwatched": True},
        {"name": "words-one", "ranks": 1, "output": "words-one", "fields": {**alone, **words}, "unwatched": True},
        {"name": "words-two", "ranks": 2, "output": "words-two", "fields": {**both, **words}, "unwatched": True},
    ]
    plan = {
        "folder": str(folder),
        "views": [{**dataclasses.asdict(view), "path": str(view.path)} for view in overlapping],
        "fields": {
            **{k: v for k, v in stage(overlapping, folder).config().items() if v is not None and k != "output_dir"},
            "save_total_limit": 99,
        },
        "runs": runs,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [warm_python, str(SCRIPT), str(folder / "plan.json")],
        env={**os.environ, **MUTED},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {entry["name"]: entry for entry in map(json.loads, done.stdout.splitlines())}
    assert list(found) == [run["name"] for run in runs]
    return lambda name: Launched(folder, **found[name])


@dataclasses.dataclass(frozen=True)
class Launched:
    """What the ranks of one training did: exit codes (a signal is negative), rows per pass, what they printed."""

    folder: Path
    name: str
    output: str
    codes: list[int]
    passes: list[list[list[int]]]
    draws: list[list[dict[str, Any]]]
    stdout: list[str]
    stderr: list[str]
    seconds: float

    def steps(self, passes_per_step: int = 1) -> list[list[int]]:
        """The rows of every optimiser step over all ranks."""
        count = min(map(len, self.passes)) // passes_per_step
        return [
            sorted(
                row
                for passes in self.passes
                for batch in passes[step * passes_per_step : (step + 1) * passes_per_step]
                for row in batch
            )
            for step in range(count)
        ]

    def losses(self) -> dict[int, list[float]]:
        """Loss, its terms and the gradient's norm by step."""
        history = json.loads((self.folder / self.output / "metrics.json").read_text())["history"]
        return {
            entry["step"]: [value for key, value in sorted(entry.items()) if key.startswith(("loss", "grad_norm"))]
            for entry in history
            if "loss" in entry
        }

    def weights(self) -> bytes:
        return (self.folder / self.output / "model.safetensors").read_bytes()


def assert_same_curve(found: Launched, wanted: Launched) -> None:
    assert found.losses().keys() == wanted.losses().keys()
    for step, values in wanted.losses().items():
        assert found.losses()[step] == pytest.approx(values, rel=2e-5), f"step {step}"


@pytest.mark.slow
def test_two_ranks_meet_their_own_rows_and_learn_what_one_learns(launched: Callable[[str], Launched]) -> None:
    one, two, deep = launched("one"), launched("two"), launched("deep")
    assert one.codes == [0] and two.codes == deep.codes == [0, 0]
    assert len(two.steps()) == 18 and all(len(rows) == 16 for rows in two.steps())
    assert two.steps() == one.steps(2) == deep.steps(2)
    assert not any({*a} & {*b} for a, b in zip(*two.passes, strict=True)), "no row is read by both ranks in a step"
    assert_same_curve(two, one)
    assert_same_curve(two, launched("wide"))
    assert_same_curve(deep, one)


@pytest.mark.slow
def test_two_ranks_resume_with_the_exact_next_batch(launched: Callable[[str], Launched]) -> None:
    two, killed, resumed = launched("two"), launched("killed"), launched("resumed")
    assert killed.codes[1] == -9 and killed.codes[0] != 0 and resumed.codes == [0, 0]
    assert resumed.steps() == two.steps()[4:], "the checkpoint was of step 4"
    assert resumed.weights() == two.weights() and resumed.losses() == two.losses()


@pytest.mark.slow
def test_an_interrupt_of_one_rank_ends_both_with_a_checkpoint_of_that_step(launched: Callable[[str], Launched]) -> None:
    two, interrupted, continued = launched("two"), launched("interrupted"), launched("continued")
    assert interrupted.codes == [130, 130] and interrupted.steps() == two.steps()[:6]
    assert continued.codes == [0, 0] and continued.steps() == two.steps()[6:]
    assert continued.weights() == two.weights()


@pytest.mark.slow
def test_a_run_is_resumed_by_another_number_of_ranks(launched: Callable[[str], Launched]) -> None:
    one = launched("one")
    for killed, resumed, passes in (("killed-0", "resumed-alone", 2), ("killed-alone", "resumed-by-two", 1)):
        assert launched(killed).codes[0] == -9
        steps = launched(resumed).steps(passes)
        assert 0 < len(steps) < 18 and steps == one.steps(2)[18 - len(steps) :]
        assert_same_curve(launched(resumed), one)


@pytest.mark.slow
def test_two_ranks_go_through_phases_as_one_does(launched: Callable[[str], Launched]) -> None:
    one, two = launched("phases-one"), launched("phases-two")
    assert one.codes == [0] and two.codes == [0, 0] and len(two.steps()) == 18
    assert two.steps() == one.steps(2)
    assert_same_curve(two, one)
    killed, resumed = launched("phases-killed"), launched("phases-resumed")
    assert killed.codes[1] == -9 and resumed.codes == [0, 0]
    assert resumed.steps() == two.steps()[11:], "phase 1 has 7 steps, the checkpoint was of step 4 of phase 2"
    assert resumed.weights() == two.weights() and resumed.losses() == two.losses()


@pytest.mark.slow
def test_methods_that_draw_draw_alike_on_all_ranks_and_learn_what_one_learns(
    launched: Callable[[str], Launched],
) -> None:
    """Layers by epoch (rail-kd), other rows by step and a scale fixed in the first one (codir)."""
    one, two = launched("drawing-one"), launched("drawing-two")
    assert one.codes == [0] and two.codes == [0, 0]
    assert two.draws[0] == two.draws[1] == one.draws[0][::2] == one.draws[0][1::2] and len(two.draws[0]) == 18
    assert len({str(drawn["layers"]) for drawn in two.draws[0]}) == 2, "one draw for each of the two epochs"
    assert len({str(drawn["negatives"]) for drawn in two.draws[0]}) == 18
    assert_same_curve(two, one)


@pytest.mark.slow
def test_two_ranks_learn_from_masked_text_what_one_learns(launched: Callable[[str], Launched]) -> None:
    """Ranks have other numbers of masked tokens, and their losses are means over examples all the same."""
    one, two = launched("masked-one"), launched("masked-two")
    assert one.codes == [0] and two.codes == [0, 0] and len(two.losses()) == 4
    assert_same_curve(two, one)


@pytest.mark.slow
def test_two_ranks_learn_from_words_what_one_learns(launched: Callable[[str], Launched]) -> None:
    """Each rank predicts the words of its part of the rows held back; together they score all of them."""
    one, two = launched("words-one"), launched("words-two")
    assert one.codes == [0] and two.codes == [0, 0] and len(two.losses()) == 4
    assert_same_curve(two, one)
    alone, together = (json.loads((run.folder / run.output / "metrics.json").read_text()) for run in (one, two))
    assert alone["metrics"].keys() >= {"f1", "agreement"} and together["metrics"] == alone["metrics"]


@pytest.mark.slow
def test_rank_0_alone_prints_skips_and_refuses_and_the_others_end_alike(launched: Callable[[str], Launched]) -> None:
    two, again = launched("two"), launched("again")
    assert json.loads(two.stdout[0])["rows"] == 200 and two.stdout[1] == two.stderr[1] == ""
    assert again.codes == [0, 0] and json.loads(again.stdout[0])["skipped"] is True and again.stdout[1] == ""
    assert again.passes == [[], []]
    refused, diverged = launched("refused"), launched("diverged")
    assert refused.codes == diverged.codes == [3, 3]
    assert "learning_rate" in str(json.loads(refused.stdout[0])["error"]["details"])
    assert "diverged" in json.loads(diverged.stdout[0])["error"]["what"]
    for run in (refused, diverged):
        assert run.stdout[1] == run.stderr[1] == "" and run.seconds < 30
    checkpoints = (two.folder / "two" / "checkpoints").glob("*/rng_state_*.pth")
    assert {file.name for file in checkpoints} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_a_shifted_gather_is_noticed_on_every_rank(launched: Callable[[str], Launched]) -> None:
    shifted = launched("shifted")
    assert 0 not in shifted.codes and "of another row" in "".join(shifted.stderr + shifted.stdout)


@pytest.mark.slow
def test_torchrun_starts_the_real_command(view: Any, tmp_path: Path) -> None:
    """As users do; exit codes, rows and resume are looked at above."""
    command = [
        "--view",
        str(view.path),
        "--student",
        SMALL,
        "--num-train-epochs",
        "1",
        "--output-dir",
        tmp_path / "run",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kd"]
    done = subprocess.run(
        [*launch, "train-student", *map(str, command), "--per-device-train-batch-size", "8", "--json", "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 7
    training = json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]
    assert training["ranks"] == 2 and training["rows_per_step"] == 16
