"""The workflows that come with kd, each run at toy size with a tiny teacher; and the data that they bring."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.artifact import open_artifact
from kd.pipeline.stage import Stage, execute
from kd.pipeline.workflow import read_workflow
from kd.stages import StageClasses

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
NAMES = ("cats", "dogs", "friends")


def write_dataset(folder: Path, sentences: list[str], *, test: str, pairs: bool = False) -> Path:
    """A labelled dataset with the splits `train` and `test`, its label a function of the text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for split, part in (("train", sentences[:140]), (test, sentences[140:])):
        labels = [sum(map(ord, text.split()[1])) % (2 if pairs else 3) for text in part]
        columns: dict[str, Any] = {"label": labels}
        if pairs:
            columns |= {"sentence1": part, "sentence2": part[1:] + part[:1]}
        else:
            columns |= {"text": part, "sentence": part, "label_name": [NAMES[label] for label in labels]}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


QUICKSTART = {
    **{"labels_per_class": 5, "max_length": 32, "teacher_epochs": 1, "bilstm_epochs": 1},
    **{"bert_layers": 1, "bert_start": "layers:2", "bert_epochs": 1},
}


def kd_run(python: str, *words: str) -> dict[str, Any]:
    command = [python, "-m", "kd", "run", *words, "--json"]
    ran = subprocess.run(command, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    parsed = json.loads(ran.stdout)
    assert isinstance(parsed, dict)
    return parsed


def states(result: dict[str, Any]) -> dict[str, str]:
    return {step["id"]: step["state"] for step in result["steps"]}


@pytest.mark.slow
def test_the_quickstart_runs_whole_and_an_edit_would_run_only_what_depends_on_it(
    tmp_path: Path, tiny_teacher: Path, sentences: list[str], warm_python: str
) -> None:
    data = write_dataset(tmp_path / "data", sentences, test="test")
    given = {**QUICKSTART, "data": data, "model": tiny_teacher}
    words = [str(WORKFLOWS / "quickstart.yaml"), "--output-dir", str(tmp_path / "runs"), "--jobs", "2"]
    words += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]

    first = kd_run(warm_python, *words)
    assert {*states(first).values()} == {"done"}
    assert [*states(first)] == ["corpus", "teacher", "view", "bilstm-baseline", "bilstm", "bert", "compare"]
    table = first["comparison_table"]
    assert all(word in table for word in ("teacher", "start", "distilled", "bilstm", "bert")), table
    stores = sorted((tmp_path / "runs" / "stores").iterdir())
    assert [store.name for store in stores] == [open_artifact(tmp_path / "runs" / "teacher").fingerprint[:8] + "-32"]

    edited = kd_run(warm_python, *words, "--set", "bert_epochs=2", "--dry-run")
    assert states(edited) == {
        **dict.fromkeys(("teacher", "corpus", "view", "bilstm-baseline", "bilstm"), "already done"),
        **{"bert": "would run again", "compare": "follows"},
    }
    assert {step["id"]: step["why"] for step in edited["steps"]}["bert"] == "config.num_train_epochs: 1.0 → 2.0"


def run_here(workflow: str, output_dir: Path, given: dict[str, Any]) -> dict[str, Stage]:
    """Run a workflow's steps in this process, one after the other."""
    found = read_workflow(str(WORKFLOWS / workflow), StageClasses(), variables=given, output_dir=str(output_dir))
    places = {step.id: step.output_dir for step in found.steps}

    def fingerprint_of(id: str, short: bool) -> str:
        return open_artifact(str(places[id])).fingerprint[: 8 if short else None]

    ran: dict[str, Stage] = {}
    for step in found.steps:
        ran[step.id] = step.resolve(fingerprint_of)
        outcome = execute(ran[step.id])
        assert outcome.failure is None
    return ran


@pytest.mark.slow
def test_the_sst2_workflow_runs_whole(tmp_path: Path, tiny_teacher: Path, sentences: list[str]) -> None:
    data = write_dataset(tmp_path / "data", sentences, test="validation")
    given = {
        **{"data": str(data), "model": str(tiny_teacher), "labels_total": 30, "max_length": 32},
        **{"seeds": [1], "teacher_epochs": 1, "steps": 4, "batch_size": 16, "validation_fraction": 0.2},
    }
    ran = run_here("sst2-bilstm.yaml", tmp_path / "runs", given)
    rows = {name: open_artifact(tmp_path / "runs" / name) for name in ("view", "grown-views/v0", "grown-views/v1")}
    assert rows["view"].manifest["summary"]["rows_new"] == len(sentences[:140])
    # The other views find the originals in the store.
    assert rows["grown-views/v0"].manifest["summary"]["rows_computed"] == 0
    assert rows["grown-views/v1"].manifest["summary"]["rows_known"] >= len(sentences[:140])
    assert [*ran][-1] == "compare"
    compared = open_artifact(ran["compare"].output_dir).manifest["summary"]
    assert [group["role"] for group in compared["groups"]] == ["floor", "start", "distilled", "distilled"]
    assert [group["view"] for group in compared["groups"]] == [None, None, "v0", "v1"]
    assert all(len(group["tried"]) == 2 for group in compared["groups"])


@pytest.mark.slow
def test_the_mrpc_workflow_runs_whole(tmp_path: Path, tiny_teacher: Path, sentences: list[str]) -> None:
    data = write_dataset(tmp_path / "data", sentences, test="validation", pairs=True)
    given = {
        **{"data": str(data), "model": str(tiny_teacher), "max_length": 40, "num_variants": 1, "seeds": [1]},
        **{"layers": 1, "start": "layers:2", "signals": "logits,hidden.cls@1", "teacher_epochs": 1},
        **{"method": "soft-target:0.5:temperature=2,hard:0.5", "steps": 4, "batch_size": 16},
        **{"learning_rates": [1e-4]},
    }
    run_here("mrpc-bert.yaml", tmp_path / "runs", given)


@pytest.mark.slow
def test_the_workflow_of_general_distillation_runs_whole(
    tmp_path: Path, tiny_teacher: Path, sentences: list[str]
) -> None:
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "encoder")
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(f'"{text}"\n' for text in sentences))
    given = {
        **{"data": str(texts), "task": str(write_dataset(tmp_path / "data", sentences, test="test"))},
        **{"model": str(tmp_path / "encoder"), "student": "bert:num_layers=1:hidden_size=16:heads=4"},
        **{"general_layers": 1, "general_steps": 4, "labels_per_class": 10, "max_length": 32, "teacher_epochs": 1},
        **{"steps": 4, "learning_rates": [1e-3], "seeds": [1, 2], "batch_size": 8},
    }
    ran = run_here("general-distillation.yaml", tmp_path / "runs", given)
    groups = open_artifact(ran["compare"].output_dir).manifest["summary"]["groups"]
    assert [group["role"] for group in groups] == ["start", "start", "distilled", "distilled"]
    assert [group["seeds"] for group in groups] == [[1, 2]] * 4
    general = open_artifact(tmp_path / "runs" / "general-student").content
    assert general["task"] == "encoder" and general["method"] == "minilmv2:1"


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_workflow_that_comes_with_kd_is_read_without_a_mistake(file: Path) -> None:
    given = {"data": "some/data"} if file.stem not in ("quickstart", "all-methods") else {}
    workflow = read_workflow(str(file), StageClasses(), variables=given)
    assert workflow.steps[-1].stage.command == "compare"


def shapes_of(width: int, num_layers: int, heads: int) -> Any:
    """A student beside the packaged MiniLM."""
    from kd.stages.train_student.methods import Shapes

    widths = (width,) * (num_layers + 1)
    return Shapes(
        task="single-label",
        num_labels=77,
        token_widths=widths,
        sentence_widths=widths,
        teacher_layers=6,
        teacher_width=384,
        student_heads=heads,
        attention_width=width,
        teacher_heads=12,
    )


def test_the_workflow_of_all_methods_has_every_method_that_fits_for_both_students() -> None:
    from kd.stages.train_student import TrainStudent
    from kd.stages.train_student.methods import methods, parse_methods
    from kd.stages.train_student.recipe import num_steps, read_recipe

    workflow = read_workflow(str(WORKFLOWS / "all-methods.yaml"), StageClasses(), variables={"seeds": [1]})
    used: dict[str, set[str]] = {"deep": set(), "narrow": set()}
    settings: dict[str, set[tuple[Any, ...]]] = {"deep": set(), "narrow": set()}
    for step in workflow.steps:
        group, stage = step.id.split("[")[0], step.resolve(lambda *_: "0")
        if not isinstance(stage, TrainStudent):
            continue
        form = shapes_of(384, 3, 12) if group == "deep" else shapes_of(128, 2, 4)
        if stage.recipe is not None:
            phases = read_recipe(stage.recipe, stage, form)
            terms = [term for phase in phases for term in phase.terms]
            assert stage.max_steps is not None and min(num_steps(phases, total=stage.max_steps, steps_per_epoch=9)) > 9
        else:
            terms = [] if stage.baseline else [*parse_methods(stage.method)]
        for term in terms:
            term.method.signals(form)  # raises where it does not fit
        used[group] |= {term.method.name for term in terms}
        settings[group].add((stage.max_steps, stage.per_device_train_batch_size, stage.validation_fraction))
    assert used["deep"] == {*methods}
    assert used["narrow"] == {*methods} - {"minilm"}, "which compares head by head"
    assert all(len(found) == 1 for found in settings.values()), "a table has one budget"


RECIPES = sorted((WORKFLOWS / "methods").glob("*.yaml"))


def test_every_method_has_its_recipe() -> None:
    from kd.stages.train_student.methods import methods

    assert {file.stem for file in RECIPES} == {*methods} - {"hard"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_a_methods_recipe_caches_what_it_needs_and_compares_it_with_plain_soft_targets(file: Path) -> None:
    from kd.pipeline.store import parse_signals
    from kd.stages.train_student.methods import parse_methods

    workflow = read_workflow(str(file), StageClasses())
    steps = {step.id: step for step in workflow.steps}
    values = {name: dict(step.values) for name, step in steps.items()}
    terms = parse_methods(values[file.stem]["method"])
    assert file.stem in [term.method.name for term in terms]
    form = shapes_of(384, 3, 12)
    needed = {signal for term in terms for signal in term.method.signals(form)}
    view = values.get(f"view-{file.stem}", values["view-logits"])
    assert needed == {*parse_signals(view["signals"], 6)}, "caches more or less than it needs"
    compared = values[f"compare-{file.stem}"]["runs"]
    assert [Path(run).name for run in compared] == ["no-teacher", "plain", file.stem]
    assert values["no-teacher"]["baseline"] and values["plain"]["method"] != values[file.stem]["method"]


@pytest.mark.slow
def test_recipes_of_several_methods_share_teacher_store_and_the_rows_to_compare_with(
    tmp_path: Path, tiny_teacher: Path, sentences: list[str]
) -> None:
    data = write_dataset(tmp_path / "data", sentences, test="test")
    given = {
        **{"data": str(data), "model": str(tiny_teacher), "labels_per_class": 5, "max_length": 32, "teacher_epochs": 1},
        **{"student": "bert:num_layers=1", "start": "layers:2", "epochs": 1},
    }
    signals = {"minilmv2": "attention.qkv@2", "tinybert": "hidden.tok@0+2,attention.score@2", "codir": "hidden.cls@1"}
    made: dict[str, set[Path]] = {}
    for name, needed in signals.items():
        toy = {"signals": f"logits,{needed}", "method": f"soft-target:0.9,{name}:0.1,hard:0.1"}
        ran = run_here(f"methods/{name}.yaml", tmp_path / "runs", {**given, **toy})
        assert [*ran][-1] == f"compare-{name}"
        made[name] = {path for path in (tmp_path / "runs").iterdir()}
    assert {path.name for path in made["tinybert"] - made["minilmv2"]} == {
        "view-tinybert",
        "tinybert",
        "compare-tinybert",
    }
    assert len([*(tmp_path / "runs" / "stores").glob("*/store.json")]) == 1
    summary = open_artifact(tmp_path / "runs" / "compare-codir").manifest["summary"]
    assert [group["role"] for group in summary["groups"]] == ["start", "distilled", "distilled"]


def test_the_banking77_files_are_the_ones_their_attribution_names() -> None:
    folder = WORKFLOWS / "data" / "banking77"
    text = (folder / "ATTRIBUTION.md").read_text()
    rows = re.findall(r"\| `(\w+\.parquet)` \|.*\| `([0-9a-f]{64})` \|", text)
    assert {name for name, _ in rows} == {path.name for path in folder.glob("*.parquet")}
    for name, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert "CC BY 4.0" in text and "PolyAI" in text and "Casanueva" in text
