"""Workflow files: read whole, every mistake found before anything runs, references and matrices expanded."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy_stages import STAGES

from kd.pipeline.errors import UsageError
from kd.pipeline.scheduler import commands_of
from kd.pipeline.workflow import Workflow, parse_variable, read_workflow


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, **given: Any) -> Workflow:
    Path("flow.yaml").write_text(textwrap.dedent(text))
    return read_workflow("flow.yaml", STAGES, **given)


def commands(text: str, **given: Any) -> dict[str, str]:
    workflow = read(text, **given)
    return dict(zip([step.id for step in workflow.steps], commands_of(workflow), strict=True))


def problems(text: str, **given: Any) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read(text, **given)
    return caught.value.details


CHAIN = """
    name: chain
    variables: {value: 3, label: "${vars.value}-x"}
    steps:
      - id: first
        stage: make
        with: {value: "${vars.value}", label: "label ${vars.label}"}
      - id: second
        stage: fit model
        with: {sources: ["${steps.first.output_dir}"]}
      - stage: compare
        with: {things: ["${steps.second.output_dir}", "${steps.first.output_dir}"]}
    """


def test_a_chain_becomes_plain_commands_in_order() -> None:
    assert commands(CHAIN) == {
        "first": "kd make --value 3 --label 'label 3-x' --output-dir runs/chain/first",
        "second": "kd fit model --sources runs/chain/first --output-dir runs/chain/second",
        "compare": "kd compare runs/chain/second runs/chain/first",
    }


def test_dependencies_follow_from_references_wherever_a_step_stands_in_the_file() -> None:
    workflow = read(
        """
        steps:
          - {id: last, stage: make, with: {sources: "${steps.middle.output_dir}"}}
          - {id: alone, stage: make, needs: middle}
          - {id: middle, stage: make, with: {label: "of ${steps.first.short_fingerprint}"}}
          - {id: first, stage: make}
        """
    )
    assert [step.id for step in workflow.steps] == ["first", "middle", "last", "alone"]
    assert {step.id: step.needs for step in workflow.steps} == {
        **{"first": (), "middle": ("first",), "last": ("middle",), "alone": ("middle",)}
    }


def test_set_overrides_a_variable_and_what_is_made_of_it() -> None:
    name, value = parse_variable("value=7")
    assert commands(CHAIN, variables={name: value})["first"] == (
        "kd make --value 7 --label 'label 7-x' --output-dir runs/chain/first"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-3", 0.001),
        ("a=[1, x]", [1, "x"]),
        ("a=x=y", "x=y"),
        ("a=k: v", "k: v"),
        ("a=", None),
        ("a=[", "["),
    ],
)
def test_a_variable_on_the_command_line_is_read_as_yaml_where_that_makes_sense(text: str, value: object) -> None:
    assert parse_variable(text) == ("a", value)


def test_places_are_relative_to_the_file_and_may_be_moved() -> None:
    Path("flows").mkdir()
    Path("flows/a.yaml").write_text('steps: [{stage: make, with: {label: "${workflow.dir}/data ${workflow.name}"}}]')
    workflow = read_workflow("flows/a.yaml", STAGES)
    assert commands_of(workflow) == ["kd make --label 'flows/data a' --output-dir runs/a/make"]
    moved = read_workflow("flows/a.yaml", STAGES, output_dir="/tmp/elsewhere")
    assert moved.steps[0].output_dir == "/tmp/elsewhere/make"


def test_a_fingerprint_that_is_not_known_yet_is_asked_for_in_the_shell() -> None:
    printed = commands(
        """
        name: f
        steps:
          - {id: a, stage: make}
          - {id: b, stage: make, with: {label: "store of-${steps.a.short_fingerprint}/it's", output_dir: "out dir"}}
          - {id: c, stage: make, with: {label: "${steps.b.fingerprint}"}}
        """
    )
    assert printed["b"] == (
        """kd make --label 'store of-'"$(kd fingerprint --short runs/f/a)"'/it'"'"'s' --output-dir 'out dir'"""
    )
    assert printed["c"] == """kd make --label "$(kd fingerprint 'out dir')" --output-dir runs/f/c"""


def test_a_plain_dollar_brace_can_be_written() -> None:
    assert commands('steps: [{stage: make, with: {label: "$${x} $5 $$"}}]')["make"].startswith(
        "kd make --label '${x} $5 $$'"
    )


MATRIX = """
    name: grid
    variables: {seeds: [1, 2]}
    matrix: {seed: "${vars.seeds}", kind: [a, "b/c"]}
    steps:
      - {id: base, stage: make}
      - {id: seeded, stage: make, with: {sources: "${steps.base.output_dir}", seed: "${matrix.seed}"}}
      - id: both
        stage: make
        with: {sources: "${steps.seeded.output_dir}", label: "${matrix.kind}", seed: "${matrix.seed}"}
      - {id: own, stage: make, matrix: {value: [7, 8]}}
      - {id: compare, stage: compare, with: {things: ["${steps.base.output_dir}", "${steps.both.output_dir}"]}}
    """


def test_a_step_is_expanded_over_the_axes_it_refers_to() -> None:
    printed = commands(MATRIX)
    assert [*printed] == [
        *("base", "seeded[seed=1]", "seeded[seed=2]"),
        *("both[seed=1,kind=a]", "both[seed=1,kind=b/c]", "both[seed=2,kind=a]", "both[seed=2,kind=b/c]"),
        *("own[value=7]", "own[value=8]", "compare"),
    ]
    assert printed["both[seed=2,kind=b/c]"] == (
        "kd make --label b/c --sources runs/grid/seeded/seed=2 --seed 2 --output-dir runs/grid/both/seed=2/kind=b-c"
    )


def test_an_axis_called_like_an_option_sets_it() -> None:
    assert commands(MATRIX)["own[value=8]"] == "kd make --value 8 --output-dir runs/grid/own/value=8"


def test_a_list_gathers_all_instances_of_an_expanded_step() -> None:
    places = [f"runs/grid/both/seed={seed}/kind={kind}" for seed in (1, 2) for kind in ("a", "b-c")]
    assert commands(MATRIX)["compare"].split()[2:] == ["runs/grid/base", *places]


def test_a_step_can_be_expanded_by_naming_an_axis_of_the_workflow() -> None:
    printed = commands(
        """
        matrix: {seed: [1, 2]}
        steps:
          - {id: a, stage: make, matrix: [seed]}
          - {id: b, stage: make, matrix: seed, with: {label: "${steps.a.output_dir}"}}
        """
    )
    assert printed["b[seed=2]"] == ("kd make --label runs/flow/a/seed=2 --seed 2 --output-dir runs/flow/b/seed=2")


def test_an_axis_of_named_mappings_moves_several_options_together() -> None:
    printed = commands(
        """
        matrix:
          recipe:
            - {name: slow, value: 1, rate: 1e-3}
            - {name: fast, value: 2, rate: 0.1}
        steps:
          - {stage: make, with: {value: "${matrix.recipe.value}", rate: "${matrix.recipe.rate}"}}
        """
    )
    assert printed["make[recipe=fast]"] == "kd make --value 2 --rate 0.1 --output-dir runs/flow/make/recipe=fast"


def test_the_points_of_an_axis_set_options_of_their_own_over_those_of_the_step() -> None:
    printed = commands(
        """
        variables: {most: 9}
        steps:
          - id: row
            stage: make
            matrix:
              way:
                - {name: plain}
                - {name: labelled, with: {label: "${vars.most} a"}}
                - {name: high, with: {value: "${vars.most}", rate: 0.5}}
            with: {value: 4}
        """
    )
    assert printed == {
        "row[way=plain]": "kd make --value 4 --output-dir runs/flow/row/way=plain",
        "row[way=labelled]": "kd make --value 4 --label '9 a' --output-dir runs/flow/row/way=labelled",
        "row[way=high]": "kd make --value 9 --rate 0.5 --output-dir runs/flow/row/way=high",
    }


def test_only_keeps_a_step_and_what_it_needs() -> None:
    assert [s.id for s in read(CHAIN).only(["second"]).steps] == ["first", "second"]
    assert [s.id for s in read(MATRIX).only(["both[seed=1,kind=a]"]).steps] == [
        "base",
        "seeded[seed=1]",
        "both[seed=1,kind=a]",
    ]
    with pytest.raises(UsageError, match=r"no step 'secnd' \(did you mean 'second'\?\)"):
        read(CHAIN).only(["secnd"])


def test_all_mistakes_are_found_at_once_with_lines_and_near_matches() -> None:
    found = problems(
        """\
        nmae: x
        variables: {value: 1}
        steps:
          - {id: a, stage: mkae}
          - id: b
            stage: make
            with:
              vlaue: 1
              label: ${vars.valeu}
              rate: fast
        """
    )
    assert [line.split(" (did")[0] for line in found] == [
        "flow.yaml:1: a workflow has no key 'nmae'",
        "flow.yaml:4: unknown stage 'mkae'",
    ]
    found = problems(
        """\
        variables: {value: 1}
        steps:
          - {id: c, stage: make, with: {vlaue: 1, rate: fast}}
          - id: b
            stage: make
            with:
              label: ${vars.valeu}
        """
    )
    assert found == [
        "flow.yaml:3: step 'c': vlaue: make has no such setting (did you mean 'value' or 'label'?)",
        "flow.yaml:3: step 'c': rate is 'fast'; expected a number or null",
        "flow.yaml:7: step 'b': label: ${vars.valeu}: vars has no 'valeu' (did you mean 'value'?)",
    ]


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (
            "[{stage: make, with: {label: '${steps.mkae.output_dir}'}}]",
            "no step is called 'mkae' (did you mean 'make'?)",
        ),
        ("[{stage: make, needs: [x]}]", "step 'make': needs: no step is called 'x'"),
        ("[{stage: make, with: {label: '${steps.make.output_dir}'}}]", "wait for each other in a circle"),
        (
            "[{id: a, stage: make, needs: b}, {id: b, stage: make, needs: a}]",
            "steps wait for each other in a circle: a → b → a",
        ),
        ("[{stage: make}, {stage: make}]", "two steps are called 'make'"),
        ("[{id: a/b, stage: make}]", "step id 'a/b' is not letters, digits, '_' and '-'"),
        ("[{id: a}]", "step 'a' has no `stage`"),
        ("[{id: a, stage: [make]}]", "unknown stage ['make']"),
        ("[{stage: make, needs: 5}]", "`needs` is not a list of names"),
        ("[{stage: make, matrix: [{value: 1}]}]", "`matrix` is not a list of names"),
        ("[make]", "a step is not `key: value` lines: 'make'"),
        ("[]", "`steps` is not a list of steps"),
        ("[{stage: make, with: [value]}]", "`with` is not `option: value` lines"),
        ("[{stage: make, wiht: {}}]", "a step has no key 'wiht' (did you mean 'with'?)"),
        ("[{stage: make, with: {value: -1}}]", "step 'make': --value is -1; expected 0 or more"),
        ("[{stage: compare}]", "step 'compare': compare needs THING..."),
        (
            "[{id: j, stage: compare, with: {things: x}}, {stage: make, with: {label: '${steps.j.output_dir}'}}]",
            "${steps.j.output_dir}: compare makes no artifact",
        ),
        (
            "[{id: a, stage: make}, {id: b, stage: make, with: {label: '${steps.a.ouput_dir}'}}]",
            "a step has no 'ouput_dir' (did you mean 'output_dir'?)",
        ),
        ("[{stage: make, with: {label: '${matrix.seed}'}}]", "axis 'seed', which no matrix has"),
        ("[{stage: make, with: {label: '${varz.x}'}}]", "${varz.x} is no reference (did you mean 'vars'?)"),
        ("[{stage: make, with: {label: '${x}'}}]", "${x} is no reference"),
        ("[{stage: make, matrix: {value: 3}}]", "axis 'value' is not a list with an entry"),
        ("[{stage: make, matrix: {value: [3, 3]}}]", "axis 'value' has an entry twice"),
        ("[{stage: make, matrix: {way: [{name: a, with: 3}]}}]", "axis 'way': `with` of a is not `option: value`"),
        ("[{stage: make, matrix: {way: [{name: a, with: {valu: 3}}]}}]", "has no such setting (did you mean 'value'?)"),
        ("[{stage: make, matrix: {way: [{name: a, with: {output-dir: x}}]}}]", "`with` of a cannot say output_dir"),
        ("[{stage: make, matrix: {value: [3, -3]}}]", "step 'make': --value is -3"),
        (
            "[{id: a, stage: make, matrix: {value: [1, 2]}},"
            " {id: b, stage: make, with: {label: '${steps.a.output_dir}'}}]",
            "label takes one value and ${steps.a.output_dir} stands for 2: expand this step too (matrix: [value])",
        ),
        (
            "[{id: a, stage: make, with: {output_dir: x}}, {id: b, stage: make, with: {output_dir: ./x}}]",
            "steps 'a' and 'b' both write to x",
        ),
        (
            "[{id: a, stage: make, with: {output_dir: x}}, {id: b, stage: make, with: {output_dir: x/y}}]",
            "steps 'a' and 'b' write into each other",
        ),
        (
            "[{id: a, stage: make}, {id: b, stage: make, with: {output_dir: '${steps.a.output_dir}x'}}]",
            "output_dir cannot refer to another step",
        ),
        ("[{stage: make, matrix: {value: [1, 2]}, with: {output_dir: x}}]", "both write to x"),
        ("[{id: 'a', stage: make, matrix: {label: ['x/y', 'x y']}}]", "both write to runs/flow/a/label=x-y"),
    ],
)
def test_a_mistake_in_a_step_is_named_before_anything_runs(steps: str, problem: str) -> None:
    assert any(problem in line for line in problems(f"steps: {steps}\n")), problems(f"steps: {steps}\n")


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ("{a: '${vars.b}', b: '${vars.a}'}", "variables refer to each other in a circle"),
        ("{a: '${vars.c}'}", "flow.yaml:1: ${vars.c}: vars has no 'c'"),
        ("{a: [1], b: 'x${vars.a}'}", "${vars.a} is a list and cannot stand inside a text"),
        ("{a: null, b: 'x${vars.a}'}", "${vars.a} has no value yet: give it with --set a=VALUE"),
        ("[a]", "`variables` is not `name: value` lines"),
        ("{5: a}", "the name of a variable is 5, which is no word"),
    ],
)
def test_a_mistake_in_a_variable_is_named(variables: str, problem: str) -> None:
    assert any(problem in line for line in problems(f"variables: {variables}\nsteps: [{{stage: make}}]\n"))


def test_a_matrix_of_billions_is_refused_before_it_is_made() -> None:
    axes = ", ".join(f"a{axis}: [{', '.join(map(str, range(50)))}]" for axis in range(6))
    (found,) = problems(f"matrix: {{{axes}}}\nsteps: [{{stage: make, matrix: [a0, a1, a2, a3, a4, a5]}}]\n")
    assert "step 'make' would run 15625000000 times (50 a0 x 50 a1 x" in found and "at most 1000" in found


def test_an_unknown_variable_on_the_command_line_is_refused() -> None:
    assert problems(CHAIN, variables={"vaule": 3}) == [
        "--set vaule: flow.yaml has no variable 'vaule' (did you mean 'value'?)"
    ]


def test_the_same_mistake_in_every_instance_is_told_once() -> None:
    assert len(problems("steps: [{stage: make, matrix: {value: [1, 2, 3]}, with: {rate: x}}]")) == 1


def test_reading_a_workflow_touches_nothing() -> None:
    read(MATRIX)
    assert [path.name for path in Path().iterdir()] == ["flow.yaml"]
