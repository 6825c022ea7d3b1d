"""Methods as users write them: parsing, signals, projections, and losses put together from student and teacher."""

from __future__ import annotations

import pytest
import torch

from kd.pipeline.errors import UsageError
from kd.stages.train_student.methods import Shapes, StudentOutputs, Targets, layer_pairs, methods, parse_methods


def shapes(**changes: object) -> Shapes:
    values: dict[str, object] = {
        "task": "single-label",
        "num_labels": 3,
        "token_widths": (8, 8, 8, 8),
        "sentence_widths": (8, 8, 8, 8),
        "teacher_layers": 12,
        "teacher_width": 16,
    }
    return Shapes(**{**values, **changes})  # type: ignore[arg-type]


def make(spec: str) -> object:
    (term,) = parse_methods(spec)
    return term.method


def test_weights_and_options_are_read_from_text() -> None:
    terms = parse_methods("soft-target:0.9:temperature=4, hard:0.1")
    assert [str(term) for term in terms] == ["soft-target:0.9:temperature=4", "hard:0.1"]
    assert parse_methods(["soft-target:0.9:temperature=4", "hard:0.1"]) == terms
    assert str(parse_methods("hidden-mse:layer-map=1-2+2-4")[0]) == "hidden-mse:1:layer_map=1-2+2-4"


@pytest.mark.parametrize(
    "spec", ["soft-target", "pkd:0.1:layers=last:normalize=false", "logit-mse:2.5:reduction=mean_all", "hard"]
)
def test_the_written_form_of_a_method_reads_back_as_itself(spec: str) -> None:
    terms = parse_methods(spec)
    assert parse_methods([str(term) for term in terms]) == terms


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("soft-targets", "did you mean 'soft-target'?"),
        ("nonsense", "known: hard, hidden-mse, logit-mse, pkd, soft-target"),
        ("soft-target:temprature=4", "did you mean 'temperature'?"),
        ("hard:temperature=4", "'hard' has none"),
        ("soft-target:temperature=hot", "expected a number"),
        ("soft-target:temperature=0", "expected above 0"),
        ("soft-target:high", "the weight 'high'"),
        ("soft-target:-1", "not a number above 0"),
        ("soft-target:nan", "not a number above 0"),
        ("soft-target:0.5:0.5", "more than one weight"),
        ("logit-mse:reduction=sum", "expected one of sum_class, mean_all"),
        ("pkd:normalize=maybe", "expected true or false"),
        ("soft-target,soft-target:2", "given twice"),
        ("soft-target:temperature", "the weight 'temperature'"),
        ("soft-target:=4", "key=value"),
        (":0.5", "no name"),
        ("", "no method"),
        (",", "no method"),
    ],
)
def test_a_malformed_method_is_refused_with_help(spec: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_methods(spec)
    assert words in str(error.value)


def test_the_same_method_may_be_used_twice_with_other_options() -> None:
    assert len(parse_methods("hidden-mse:layer_map=1-2,hidden-mse:layer_map=2-4:at=cls")) == 2


@pytest.mark.parametrize(
    ("text", "with_last", "expected"),
    [
        ("skip", True, ((1, 4), (2, 8), (3, 12))),
        ("skip", False, ((1, 4), (2, 8))),
        ("last", True, ((1, 10), (2, 11), (3, 12))),
        ("last", False, ((1, 10), (2, 11))),
        ("1-4+3-7+0-0", True, ((1, 4), (3, 7), (0, 0))),
    ],
)
def test_layer_maps(text: str, with_last: bool, expected: tuple[tuple[int, int], ...]) -> None:
    assert layer_pairs(text, shapes(), with_last=with_last, where="layers") == expected


def test_the_maps_of_the_pkd_paper() -> None:
    six = shapes(token_widths=(8,) * 7, sentence_widths=(8,) * 7)
    assert [teacher for _, teacher in layer_pairs("skip", six, with_last=False, where="x")] == [2, 4, 6, 8, 10]
    assert [teacher for _, teacher in layer_pairs("last", six, with_last=False, where="x")] == [7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all", "expected skip, last or pairs"),
        ("1-2+", "expected skip, last or pairs"),
        ("1", "expected skip, last or pairs"),
        ("1-13", "layer 13 of the teacher, which has layers 0 to 12"),
        ("4-1", "layer 4 of the student, which has layers 0 to 3"),
    ],
)
def test_a_layer_that_does_not_exist_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        layer_pairs(text, shapes(), with_last=True, where="option 'layers'")
    assert words in str(error.value)


def test_a_student_deeper_than_its_teacher_has_no_last_map_but_a_skip_map() -> None:
    deep = shapes(teacher_layers=2)
    with pytest.raises(UsageError):
        layer_pairs("last", deep, with_last=True, where="layers")
    assert layer_pairs("skip", deep, with_last=True, where="layers") == ((1, 1), (2, 1), (3, 2))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hard", []),
        ("soft-target", ["logits"]),
        ("logit-mse", ["logits"]),
        ("pkd", ["hidden.cls@4", "hidden.cls@8"]),
        ("pkd:layers=last", ["hidden.cls@10", "hidden.cls@11"]),
        ("hidden-mse:layer_map=1-2+2-2", ["hidden.tok@2"]),
        ("hidden-mse:at=mean", ["hidden.mean@4", "hidden.mean@8", "hidden.mean@12"]),
    ],
)
def test_signals_each_method_needs(spec: str, expected: list[str]) -> None:
    assert [str(signal) for signal in make(spec).signals(shapes())] == expected


def test_projections_are_made_where_widths_differ_only() -> None:
    assert set(make("hidden-mse").projections(shapes())) == {"1-4", "2-8", "3-12"}
    assert not len(make("hidden-mse").projections(shapes(teacher_width=8)))
    pkd = make("pkd").projections(shapes())
    assert [tuple(p.shape) for p in pkd.parameters()] == [(16, 8)]
    assert not len(make("pkd").projections(shapes(teacher_width=8)))
    assert not len(make("soft-target").projections(shapes()))


def test_pkd_refuses_a_student_of_one_layer_and_says_what_to_write() -> None:
    flat = shapes(token_widths=(8, 8), sentence_widths=(8, 8))
    with pytest.raises(UsageError, match="pkd:layers=1-12"):
        make("pkd").signals(flat)
    assert [str(s) for s in make("pkd:layers=1-12").signals(flat)] == ["hidden.cls@12"]


def outputs(rows: int = 2, tokens: int = 3, width: int = 8) -> StudentOutputs:
    generator = torch.Generator().manual_seed(0)
    states = tuple(torch.randn(rows, tokens, width, generator=generator, requires_grad=True) for _ in range(4))
    mask = torch.tensor([[True] * tokens, [True] * (tokens - 1) + [False]])
    logits = torch.randn(rows, 3, generator=generator, requires_grad=True)
    return StudentOutputs(logits, mask, states, lambda layer: states[layer][:, 0])


def test_pkd_is_the_papers_sum_over_layers_of_two_minus_two_cosine() -> None:
    same = shapes(teacher_width=8)
    student = outputs()
    teacher = {f"hidden.cls@{layer}": torch.randn(2, 8) for layer in (4, 8)}
    terms = make("pkd").loss(student, Targets(teacher), torch.nn.ModuleDict(), same)
    assert set(terms) == {"pkd.1-4", "pkd.2-8"}
    for (name, value), (layer, of) in zip(terms.items(), ((1, 4), (2, 8)), strict=True):
        cosine = torch.cosine_similarity(student.sentence(layer), teacher[f"hidden.cls@{of}"])
        assert value.item() == pytest.approx((2 - 2 * cosine).mean().item(), rel=1e-5), name
    official = make("pkd:reduction=official").loss(student, Targets(teacher), torch.nn.ModuleDict(), same)
    assert sum(official.values()).item() == pytest.approx(sum(terms.values()).item() / (2 * 8), rel=1e-5)


@pytest.mark.parametrize("at", ["tok", "cls", "mean"])
def test_hidden_mse_is_the_mean_squared_error_after_the_projection(at: str) -> None:
    method = make(f"hidden-mse:layer_map=2-5:at={at}")
    student, projections = outputs(), make("hidden-mse:layer_map=2-5").projections(shapes())
    teacher = torch.randn(2, 3, 16) if at == "tok" else torch.randn(2, 16)
    terms = method.loss(student, Targets({f"hidden.{at}@5": teacher}), projections, shapes())
    states, project = student.token_states[2], projections["2-5"]
    if at == "tok":
        errors = (project(states) - teacher).square().mean(-1)
        expected = (errors[0].mean() + errors[1, :2].mean()) / 2
    elif at == "cls":
        expected = (project(states[:, 0]) - teacher).square().mean()
    else:
        means = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
        expected = (project(means) - teacher).square().mean()
    assert list(terms) == ["hidden-mse.2-5"]
    assert terms["hidden-mse.2-5"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_float16_signals_are_compared_in_float32() -> None:
    method = make("hidden-mse:layer_map=1-1")
    same, student = shapes(teacher_width=8), outputs()
    teacher = torch.randn(2, 3, 8).half()
    terms = method.loss(student, Targets({"hidden.tok@1": teacher}), torch.nn.ModuleDict(), same)
    assert terms["hidden-mse.1-1"].dtype == torch.float32


@pytest.mark.parametrize("task", ["single-label", "multi-label", "regression"])
@pytest.mark.parametrize("spec", ["soft-target:temperature=3", "logit-mse", "hard"])
def test_every_task_has_a_loss_that_falls_when_the_student_follows(task: str, spec: str) -> None:
    width = 1 if task == "regression" else 3
    teacher = 2 * torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    labels = {
        "single-label": teacher.argmax(-1),
        "multi-label": (teacher > 0).float(),
        "regression": teacher[:, 0],
    }[task]
    targets = Targets({"logits": teacher}, labels, torch.tensor([True, True]))
    form = shapes(task=task, num_labels=width)
    mask = torch.ones(2, 1, dtype=torch.bool)
    near, far = (
        make(spec).loss(StudentOutputs(scale * teacher, mask), targets, torch.nn.ModuleDict(), form)
        for scale in (0.9, -1.0)
    )
    assert list(near) == [spec.partition(":")[0]]
    assert next(iter(near.values())) < next(iter(far.values()))


def test_every_method_is_described_with_its_options_and_source() -> None:
    entries = {entry["name"]: entry for entry in methods.describe()}
    assert set(entries) == {"hard", "hidden-mse", "logit-mse", "pkd", "soft-target"}
    assert entries["soft-target"]["options"] == {"temperature": 2.0}
    assert all(entry["summary"].endswith(".") and entry["source"] for entry in entries.values())
