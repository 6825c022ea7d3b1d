"""Methods as users write them: parsing, signals, projections, and losses put together from student and teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import StageContext
from kd.stages.listings import ListMethods, ListStudents
from kd.stages.train_student import losses
from kd.stages.train_student.method_facts import BERT_BASE, method_facts, methods_of, student_forms
from kd.stages.train_student.methods import (
    Shapes,
    StudentOutputs,
    Targets,
    Unfit,
    fitting_methods,
    layer_groups,
    layer_pairs,
    methods,
    parse_methods,
)
from kd.stages.train_student.methods.base import FAMILY


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
    assert str(parse_methods("fitnets:layer-map=1-2+2-4")[0]) == "fitnets:1:layer_map=1-2+2-4"


@pytest.mark.parametrize(
    "spec", ["soft-target", "pkd:0.1:layer_map=last:normalize=false", "logit-mse:2.5:reduction=mean_all", "hard"]
)
def test_the_written_form_of_a_method_reads_back_as_itself(spec: str) -> None:
    terms = parse_methods(spec)
    assert parse_methods([str(term) for term in terms]) == terms


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("soft-targets", "did you mean 'soft-target'?"),
        ("nonsense", "unknown method 'nonsense'"),
        ("soft-target:temprature=4", "did you mean 'temperature'?"),
        ("hard:temperature=4", "'hard' (known: reduction)"),
        ("soft-target:temperature=hot", "expected a number"),
        ("soft-target:temperature=0", "expected above 0"),
        ("soft-target:high", "the weight 'high'"),
        ("soft-target:-1", "not a number above 0"),
        ("soft-target:nan", "not a number above 0"),
        ("soft-target:0.5:0.5", "more than one weight"),
        ("logit-mse:reduction=sum", "expected one of sum_class, mean_all"),
        ("minilmv2:relations=q-q+q-q", "names a pair twice"),
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
    assert len(parse_methods("fitnets:layer_map=1-2,fitnets:layer_map=2-4:at=cls")) == 2


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
        ("all", "expected skip, last, middle, final or pairs"),
        ("1-2+", "expected skip, last, middle, final or pairs"),
        ("1", "expected skip, last, middle, final or pairs"),
        ("1-13", "layer 13 of the teacher, which has layers 0 to 12"),
        ("4-1", "layer 4 of the student, which has layers 0 to 3"),
        ("1-2+1-2", "names a pair twice"),
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
        ("pkd:layer_map=last", ["hidden.cls@10", "hidden.cls@11"]),
        ("fitnets:layer_map=1-2+2-2", ["hidden.tok@2"]),
        ("fitnets:at=mean:layer_map=skip", ["hidden.mean@4", "hidden.mean@8", "hidden.mean@12"]),
    ],
)
def test_signals_each_method_needs(spec: str, expected: list[str]) -> None:
    assert [str(signal) for signal in make(spec).signals(shapes())] == expected


def test_projections_are_made_where_widths_differ_only() -> None:
    assert set(make("fitnets:layer_map=skip").projections(shapes())) == {"1-4", "2-8", "3-12"}
    assert not len(make("fitnets").projections(shapes(teacher_width=8)))
    pkd = make("pkd").projections(shapes())
    assert [tuple(p.shape) for p in pkd.parameters()] == [(16, 8)]
    assert not len(make("pkd").projections(shapes(teacher_width=8)))
    assert not len(make("soft-target").projections(shapes()))


def test_pkd_refuses_a_student_of_one_layer_and_says_what_to_write() -> None:
    flat = shapes(token_widths=(8, 8), sentence_widths=(8, 8))
    with pytest.raises(UsageError, match="pkd:layer_map=1-12"):
        make("pkd").signals(flat)
    assert [str(s) for s in make("pkd:layer_map=1-12").signals(flat)] == ["hidden.cls@12"]


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
    method = make(f"fitnets:layer_map=2-5:at={at}")
    student, projections = outputs(), make("fitnets:layer_map=2-5").projections(shapes())
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
    assert list(terms) == ["fitnets.2-5"]
    assert terms["fitnets.2-5"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_float16_signals_are_compared_in_float32() -> None:
    method = make("fitnets:layer_map=1-1")
    same, student = shapes(teacher_width=8), outputs()
    teacher = torch.randn(2, 3, 8).half()
    terms = method.loss(student, Targets({"hidden.tok@1": teacher}), torch.nn.ModuleDict(), same)
    assert terms["fitnets.1-1"].dtype == torch.float32


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
    assert {"hard", "soft-target", "fitnets", "minilmv2"} <= set(entries)
    assert entries["soft-target"]["options"] == {
        **{"temperature": 2.0, "squared": True, "flsw": 0.0, "flsw_gamma": 1.0, "reduction": "kd"}
    }
    assert all(entry["summary"].endswith(".") and entry["source"] for entry in entries.values())


def test_without_its_square_the_soft_target_loss_is_smaller_by_the_temperature_squared() -> None:
    student, teacher = outputs(), torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    with_square, without = (
        make(f"soft-target:temperature=3:squared={squared}").loss(
            student, Targets({"logits": teacher}), torch.nn.ModuleDict(), shapes()
        )["soft-target"]
        for squared in ("true", "false")
    )
    assert with_square.item() == pytest.approx(9 * without.item())


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("regular", ((1, (1, 2, 3)), (2, (4, 5, 6)))),
        ("overlap", ((1, (1, 2, 3, 4)), (2, (3, 4, 5, 6)))),
        ("cross", ((1, (1, 3)), (2, (4, 6)))),
        ("skip", ((1, (1, 3, 5)), (2, (2, 4, 6)))),
        ("all", ((1, (1, 2, 3, 4, 5, 6)), (2, (1, 2, 3, 4, 5, 6)))),
        ("1-1.2+2-5.6", ((1, (1, 2)), (2, (5, 6)))),
    ],
)
def test_groups_of_layers_are_those_of_the_ckd_paper(text: str, groups: object) -> None:
    six_to_two = shapes(token_widths=(8,) * 3, sentence_widths=(8,) * 3, teacher_layers=6)
    assert layer_groups(text, six_to_two, where="layer_map") == groups


@pytest.mark.parametrize("text", ["regular", "overlap", "cross", "skip"])
@pytest.mark.parametrize(("student", "teacher"), [(1, 12), (3, 12), (5, 12), (6, 6), (4, 2)])
def test_every_student_block_has_a_group_of_blocks_that_exist(text: str, student: int, teacher: int) -> None:
    widths = (8,) * (student + 1)
    form = shapes(token_widths=widths, sentence_widths=widths, teacher_layers=teacher)
    groups = layer_groups(text, form, where="layer_map")
    assert [m for m, _ in groups] == [*range(1, student + 1)]
    assert all(group and min(group) >= 1 and max(group) <= teacher for _, group in groups)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("every", "expected all, regular, overlap, cross, skip or groups"),
        ("1-1.x", "expected all, regular, overlap, cross, skip or groups"),
        ("1-13", "layer 13 of the teacher"),
        ("9-1", "layer 9 of the student"),
        ("1-1+1-2.3", "two groups for a student layer"),
    ],
)
def test_a_group_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        layer_groups(text, shapes(), where="option 'layer_map'")
    assert words in str(error.value)


def test_middle_and_final_are_one_pair() -> None:
    assert layer_pairs("middle", shapes(), where="x") == ((2, 6),)
    assert layer_pairs("final", shapes(), where="x") == ((3, 12),)
    assert layer_pairs("uniform", shapes(), where="x") == layer_pairs("skip", shapes(), where="x")
    with pytest.raises(UsageError, match="layer 0 of the student, which has layers 1 to 3"):
        layer_pairs("0-1", shapes(), where="x", first=1)


# --- RAIL-KD's draws -------------------------------------------------------------------------------------------------


def twelve_to_six() -> Shapes:
    return shapes(token_widths=(8,) * 7, sentence_widths=(8,) * 7)


def test_a_draw_follows_from_seed_and_epoch_alone_and_rises() -> None:
    rail, form = make("rail-kd"), twelve_to_six()
    draws = [rail.draw(1, epoch, form) for epoch in range(200)]
    torch.manual_seed(0)
    assert draws == [rail.draw(1, epoch, form) for epoch in range(200)]
    assert draws != [rail.draw(2, epoch, form) for epoch in range(200)]
    for drawn in draws:
        assert [student for student, _ in drawn] == [1, 2, 3, 4, 5]
        layers = [layer for _, layer in drawn]
        assert layers == sorted({*layers}) and layers[0] >= 1 and layers[-1] <= 11


def test_every_layer_is_drawn_equally_often() -> None:
    rail, form = make("rail-kd"), twelve_to_six()
    counts = torch.zeros(12)
    epochs = 2200
    for epoch in range(epochs):
        counts[[layer for _, layer in rail.draw(0, epoch, form)]] += 1
    # Binomial with p = 5 / 11: a standard deviation is 1 % of the trials.
    assert counts[0] == 0
    assert (counts[1:] / epochs - 5 / 11).abs().max() < 0.045


def test_embeddings_and_last_layers_take_part_on_request() -> None:
    form = twelve_to_six()
    assert [layer for layer, _ in make("rail-kd:embedding=true:final=true").draw(0, 0, form)] == [0, 1, 2, 3, 4, 5, 6]
    assert [str(s) for s in make("rail-kd").signals(form)] == [f"hidden.mean@{layer}" for layer in range(1, 12)]
    flat = shapes(token_widths=(8, 8), sentence_widths=(8, 8))
    with pytest.raises(Unfit, match="final=true"):
        make("rail-kd").signals(flat)
    with pytest.raises(Unfit, match="the teacher has 1 to draw from"):
        make("rail-kd").signals(shapes(teacher_layers=2))


def test_variants_of_a_text_are_not_told_apart_from_each_other() -> None:
    method, student, generator = make("codir:negatives_from=random"), outputs(), torch.Generator().manual_seed(0)
    names = [str(signal) for signal in method.signals(shapes())]
    own, others = ({name: torch.randn(count, 16, generator=generator) for name in names} for count in (2, 3))
    projections = method.projections(shapes())

    def loss(own_families: list[int], families: list[int]) -> float:
        targets = Targets(
            {**own, FAMILY: torch.tensor(own_families)}, negatives={**others, FAMILY: torch.tensor(families)}
        )
        return method.loss(student, targets, projections, shapes())["codir"].item()

    assert loss([7, 7], [7, 7, 7]) == 0
    assert 0 < loss([7, 8], [7, 8, 8]) < loss([7, 8], [1, 2, 3])


def test_codir_takes_the_teachers_layers_of_the_released_code() -> None:
    names = [str(signal) for signal in make("codir").signals(twelve_to_six())]
    assert names == [*(f"hidden.cls@{layer}" for layer in (1, 3, 5, 7, 9, 11)), "logits"]
    assert "logits" not in map(str, make("codir:negatives_from=random").signals(twelve_to_six()))
    assert "logits" not in map(str, make("codir").signals(shapes(task="regression")))


def test_fsp_takes_thirds_of_both_models_or_fewer_where_there_are_no_thirds() -> None:
    names = [str(signal) for signal in make("fsp").signals(twelve_to_six())]
    assert names == [f"hidden.tok@{layer}" for layer in (0, 4, 8, 12)]
    flat = shapes(token_widths=(8, 8), sentence_widths=(8, 8))
    assert [str(signal) for signal in make("fsp").signals(flat)] == ["hidden.tok@0", "hidden.tok@12"]
    with pytest.raises(UsageError, match="needs two layers"):
        make("fsp:layer_map=1-2").signals(flat)


def test_fsps_fixed_projection_is_orthonormal_the_same_in_every_run_and_never_trained() -> None:
    first, second = (make("fsp:proj_dim=5").projections(shapes())["p"] for _ in range(2))
    matrix = first.matrix_DR
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(5), atol=1e-6, rtol=0)
    assert torch.equal(matrix, second.matrix_DR) and not [*first.parameters()]


# --- which methods fit which student ---------------------------------------------------------------------------------


def test_of_text_without_labels_no_method_fits_that_reads_what_is_not_predicted() -> None:
    encoder, masked = (
        {*fitting_methods(shapes(task=task, num_labels=0, student_heads=2, teacher_heads=2, attention_width=8))}
        for task in ("encoder", "masked-lm")
    )
    assert not encoder & {"soft-target", "hard", "logit-mse"} and {"fitnets", "tinybert", "minilmv2"} <= encoder
    assert masked - encoder == {"soft-target", "hard"}


ANY = {"soft-target", "logit-mse", "hard", "fitnets", "fsp", "pkd", "distilbert", "ckd", "alp-kd", "codir", "rail-kd"}
SAME_HEADS = {"tinybert", "ir-kd", "mobilebert", "minilm"}


@pytest.mark.parametrize(
    ("changes", "fitting"),
    [
        ({"student_heads": 12, "attention_width": 8}, ANY | SAME_HEADS | {"minilmv2"}),
        ({"student_heads": 4, "attention_width": 8}, ANY | {"minilmv2"}),
        ({}, ANY),
    ],
    ids=["small or narrow BERT of the teacher's heads", "of other heads, as a MobileBERT", "BiLSTM"],
)
def test_the_methods_of_a_student_are_those_of_the_table(changes: dict[str, object], fitting: set[str]) -> None:
    form = shapes(teacher_heads=12, teacher_width=24, **changes)
    assert {*fitting_methods(form)} == fitting
    of_tokens = {"fitnets", "fsp", "distilbert", *SAME_HEADS, "minilmv2"}
    assert {*fitting_methods(form, reads_teacher_tokens=False)} == fitting - of_tokens


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        ("tinybert", {}, "tinybert:attention=none"),
        ("ir-kd", {}, "ir-kd:attention=false"),
        ("mobilebert", {"student_heads": 4, "attention_width": 8}, "mobilebert:attention=0"),
        ("mobilebert", {}, "fitnets:layer_map=skip"),
        ("mobilebert:attention=0", {}, "fitnets:layer_map=skip"),
        ("tinybert", {"token_widths": (16, 8, 8, 8)}, "tinybert:attention=none:embedding=false"),
        ("minilm", {}, "minilmv2:relations=v-v"),
        ("minilmv2", {}, "minilmv2:relations=v-v"),
        ("minilm", {"student_heads": 4, "attention_width": 8}, "minilmv2 fits any number of heads"),
        ("minilmv2:heads=5", {"student_heads": 4, "attention_width": 8}, "heads=1 or 2 or 4 or 8"),
        ("minilmv2:layer_map=skip", {"student_heads": 4, "attention_width": 8}, "matches one block"),
    ],
)
def test_a_method_that_does_not_fit_says_what_would(spec: str, changes: dict[str, object], words: str) -> None:
    form = shapes(teacher_heads=12, teacher_width=24, **changes)
    with pytest.raises(UsageError) as error:
        make(spec).signals(form)
    assert words in str(error.value)
    for part in words.split(" or "):
        if ":" in part:
            assert make(part).signals(form), "the advice works"


YES, WITHOUT_ATTENTION = "", "attention=none"
TABLE = {
    **dict.fromkeys(
        (
            "soft-target",
            "logit-mse",
            "hard",
            "fitnets",
            "fsp",
            "ckd",
            "alp-kd",
            "pkd",
            "codir",
            "rail-kd",
            "distilbert",
        ),
        (YES, YES, YES, YES),
    ),
    "tinybert": (f"{WITHOUT_ATTENTION}:embedding=false", YES, YES, WITHOUT_ATTENTION),
    "ir-kd": ("attention=false", YES, YES, "attention=false"),
    "mobilebert": (None, YES, YES, "attention=0"),
    "minilm": (None, YES, YES, None),
    "minilmv2": ("relations=v-v", YES, YES, YES),
}
"""Section 16 of the specification: BiLSTM, BERT of the teacher's shape, a narrower one with its heads, MobileBERT."""


@pytest.mark.parametrize("name", TABLE)
def test_every_cell_of_the_table_of_methods_and_students(name: str) -> None:
    forms = student_forms()
    assert [*forms] == ["bilstm", "bert", "narrower bert", "mobilebert"] and {*TABLE} == {*methods}
    assert tuple(methods_of(form)[name] for _, form in forms.values()) == TABLE[name]
    for (student, form), options in zip(forms.values(), TABLE[name], strict=True):
        if options is None:
            continue
        method = make(f"{name}:{options}" if options else name)
        reads = method.reads(form)
        assert form.student_heads or not [read for read in reads if read.startswith(("score", "qkv"))], student
        own = form.sentence_widths[-1] != form.teacher_width
        if {read.partition("@")[0] for read in reads} & {"token", "sentence", "mean"} and "relations" not in options:
            mapped = len(method.projections(form)) > 0
            assert mapped == (own or name in ("ckd", "codir", "rail-kd")), (
                f"{student}: a linear map where widths differ"
            )


def test_the_list_of_students_says_which_methods_are_for_each() -> None:
    stage = ListStudents()
    report = stage.report(stage.run(StageContext()).summary)
    assert "bert:hidden_size=384:heads=12" in report
    bilstm, mobilebert = (report.partition(f"\n{name}\n")[2] for name in ("bilstm:num_layers=2", "mobilebert"))
    assert "  not: minilm, mobilebert" in bilstm.partition("\nbert")[0]
    assert "  in part: ir-kd:attention=false, mobilebert:attention=0, tinybert:attention=none" in mobilebert


def test_the_forms_of_students_are_those_that_are_built() -> None:
    """What is said of students is of the shapes that they would really have."""
    from kd.stages.train_student.students import Start, Task, TeacherFacts, parse_student

    teacher = TeacherFacts(None, BERT_BASE)  # type: ignore[arg-type]
    for text, form in student_forms().values():
        student = parse_student(text)
        task = Task("single-label", ("a", "b"), pair=False)
        widths = student.widths(student.default_start(), teacher, task)
        assert widths == (form.token_widths, form.sentence_widths)
        assert student.attention(Start("random"), teacher) == (form.student_heads, form.attention_width)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tinybert:attention=none:hidden=false:embedding=false", "nothing to compare"),
        ("ir-kd:attention=false:cosine=false", "nothing to compare"),
        ("mobilebert:feature=0:mean=0:variance=0:attention=0", "nothing to compare"),
        ("mobilebert:mean=-1", "expected 0 or more"),
        ("minilmv2:relations=q-z", "pairs of q, k and v"),
        ("minilmv2:heads=-1", "expected 0 or more"),
        ("rail-kd:size=0", "expected 1 or more"),
        ("codir:negatives=0", "expected 1 or more"),
        ("codir:temperature=0", "expected above 0"),
        ("fsp:proj_dim=-1", "expected 0 or more"),
    ],
)
def test_an_option_that_leaves_no_loss_is_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_methods(spec)
    assert words in str(error.value)


# --- reductions of published code ------------------------------------------------------------------------------------


def test_official_reductions_are_the_default_times_what_the_codes_divide_by() -> None:
    form = shapes(teacher_width=8)
    student = outputs()
    teacher = {f"hidden.tok@{layer}": torch.randn(2, 3, 8) for layer in (6, 12)}

    def value(spec: str) -> float:
        terms = make(spec).loss(student, Targets(teacher), torch.nn.ModuleDict(), form)
        return torch.stack([*terms.values()]).sum().item()

    squares = (student.token_states[2] - teacher["hidden.tok@6"]).square().sum(-1)[student.mask_BT]
    assert value("fitnets:reduction=official") == pytest.approx(squares.sum().item() / 2 / 2, rel=1e-5)
    assert value("fitnets:reduction=token") == pytest.approx(squares.mean().item() / 8, rel=1e-5)
    cosines = torch.cosine_similarity(student.token_states[3], teacher["hidden.tok@12"], dim=-1)[student.mask_BT]
    for reduction in ("token", "official"):
        assert value(f"distilbert:reduction={reduction}") == pytest.approx((1 - cosines).mean().item(), rel=1e-5)
    tiny = "tinybert:attention=none:embedding=false:layer_map=2-6"
    assert value(f"{tiny}:reduction=official") == pytest.approx(squares.sum().item() / (2 * 3 * 8), rel=1e-5)


def test_logit_mse_compares_with_the_teachers_logits_at_a_scale() -> None:
    student = StudentOutputs(torch.tensor([[1.0, 0.0]]), torch.ones(1, 1, dtype=torch.bool))
    targets = Targets({"logits": torch.tensor([[4.0, 2.0]])})
    found = make("logit-mse:reduction=sum_class:scale=0.25").loss(student, targets, torch.nn.ModuleDict(), shapes())
    assert found["logit-mse"].item() == 0.25
    with pytest.raises(UsageError, match="'scale' of method 'logit-mse' is 0; expected above 0"):
        parse_methods("logit-mse:scale=0")


def test_flsw_gives_examples_that_are_further_off_a_lower_temperature() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 0.5], [3.0, 0.0, 0.0]])
    temperatures = losses.flsw_temperatures(logits, teacher, base=4.0, beta=2.0, gamma=2.0)
    cosines = torch.nn.functional.cosine_similarity(logits, teacher).detach()
    weights = (1 - cosines) ** 2
    assert temperatures.tolist() == pytest.approx((4 + 2 * (weights.mean() - weights)).tolist())
    assert temperatures[1] < 4 < temperatures[0] and not temperatures.requires_grad
    found = make("soft-target:temperature=4:flsw=2:flsw_gamma=2").loss(
        StudentOutputs(logits, torch.ones(2, 1, dtype=torch.bool)),
        Targets({"logits": teacher}),
        torch.nn.ModuleDict(),
        shapes(),
    )["soft-target"]
    alone = [
        losses.soft_target_kl(logits[b : b + 1], teacher[b : b + 1], temperature=float(temperatures[b])) for b in (0, 1)
    ]
    assert found.item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)
    found.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    for spec in ("soft-target:flsw=-1", "soft-target:flsw=1:squared=false"):
        with pytest.raises(UsageError, match="flsw"):
            parse_methods(spec)


# --- facts for people ------------------------------------------------------------------------------------------------


def facts_of(name: str, **fields: Any) -> dict[str, Any]:
    facts = method_facts(fields.pop("teacher", BERT_BASE), **{"length": 128, **fields})
    return {entry["name"]: entry for entry in facts}[name]


@pytest.mark.parametrize(
    ("name", "fields", "signals", "count"),
    [
        ("soft-target", {}, "logits", 8),
        ("fitnets", {}, "hidden.tok@6", 196_608),
        ("fitnets", {"length": 25}, "hidden.tok@6", 38_400),
        ("fsp", {"length": 25}, "hidden.tok@0+4+8+12", 153_600),
        ("pkd", {}, "hidden.cls@2+4+6+8+10", 7_680),
        ("pkd", {"student_layers": 3}, "hidden.cls@4+8", 3_072),
        ("minilmv2", {"length": 25}, "attention.qkv@12", 115_200),
        ("tinybert", {"student_layers": 4}, "attention.score@3+6+9+12,hidden.tok@0+3+6+9+12", 1_572_864 + 983_040),
        ("rail-kd", {}, "hidden.mean@1-11", 16_896),
    ],
)
def test_signals_and_bytes_are_those_of_the_specification(
    name: str, fields: dict[str, Any], signals: str, count: int
) -> None:
    entry = facts_of(name, **fields)
    assert (entry["signals"], entry["bytes_per_example"]) == (signals, count)


@pytest.mark.parametrize(
    ("name", "layers", "short", "long", "why"),
    [
        ("soft-target", 6, 8, 8, "a label has 4 bytes, and there are two"),
        ("fitnets", 6, 38_400, 196_608, "the smallest is the signal itself"),
        ("fsp", 6, 115_200, 589_824, "embeddings by lookup"),
        ("tinybert", 4, 213_600, 1_572_864, "scores of short texts, the layers below for long ones"),
        ("ir-kd", 6, 99_216, 1_188_864, "the same, and [CLS] states"),
        ("mobilebert", 12, 460_800, 2_359_296, "every layer gives the attention of the next"),
        ("minilm", 6, 38_400, 196_608, "the layer below, and maps"),
        ("minilmv2", 6, 38_400, 196_608, "the same"),
        ("rail-kd", 6, 16_896, 16_896, "means over tokens"),
    ],
)
def test_the_least_bytes_are_those_of_the_specification(
    name: str, layers: int, short: int, long: int, why: str
) -> None:
    """Its section 15.5, where logits count too: 12 bytes of three labels."""
    found = [facts_of(name, length=n, student_layers=layers)["smallest_bytes"] for n in (25, 128)]
    assert found == [short, long], why


def test_the_least_is_said_with_the_sidecars_it_takes() -> None:
    entry = facts_of("minilmv2")
    assert (entry["smallest"], entry["sidecars"]) == ("hidden.tok@11", ["attn_in@12"])
    report = ListMethods(length=128).report(ListMethods(length=128).run(StageContext()).summary)
    assert "least: hidden.tok@11 with sidecars attn_in@12, 196,608 bytes" in report
    assert report.count("least: ") == 1 + 6, "where it is less than the signals themselves"


def test_what_a_student_must_have_follows_from_the_method() -> None:
    assert facts_of("pkd")["students"] == "any student"
    assert facts_of("fitnets")["students"] == "the teacher's tokens"
    assert facts_of("minilmv2")["students"] == "the teacher's tokens, attention"
    assert facts_of("minilm")["students"] == "the teacher's tokens, as many heads as the teacher"
    headless = facts_of("minilm", teacher={**BERT_BASE, "num_attention_heads": 0})
    assert headless["bytes_per_example"] is None and "has none that can be watched" in headless["students"]
    with pytest.raises(UsageError, match="--length is 0"):
        facts_of("pkd", length=0)


def test_the_list_of_methods_can_be_that_of_a_teachers_folder(tiny_teacher: Path) -> None:
    stage = ListMethods(teacher=str(tiny_teacher), length=10)
    result = stage.run(StageContext())
    (entry,) = [entry for entry in result.summary["methods"] if entry["name"] == "minilmv2"]
    assert entry["signals"] == "attention.qkv@2" and entry["bytes_per_example"] == 10 * 3 * 32 * 2
    assert "attention.qkv@2, 1,920 bytes" in stage.report(result.summary)
    with pytest.raises(RefusedError, match=r"no config\.json of an encoder"):
        ListMethods(teacher="nowhere").run(StageContext())


def test_a_teacher_is_known_by_the_names_that_its_kind_gives_its_sizes(tmp_path: Path) -> None:
    from transformers import DistilBertConfig

    DistilBertConfig(dim=48, n_layers=4, n_heads=2, hidden_dim=96, num_labels=5).save_pretrained(tmp_path)
    result = ListMethods(teacher=str(tmp_path), length=10).run(StageContext())
    facts = {entry["name"]: (entry["signals"], entry["bytes_per_example"]) for entry in result.summary["methods"]}
    assert (facts["logit-mse"], facts["fitnets"]) == (("logits", 20), ("hidden.tok@2", 960))
