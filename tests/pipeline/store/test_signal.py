"""Signals are named, parsed and placed in one way; wrong names are met with the right one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.errors import UsageError
from kd.pipeline.store.signal import (
    ENCODINGS,
    INPUTS,
    SIGNALS,
    ArraySpec,
    Signal,
    array_spec,
    format_signals,
    parse_signals,
)


def named(text: str, num_layers: int = 6) -> list[str]:
    return [str(signal) for signal in parse_signals(text, num_layers)]


def test_layers_are_written_in_every_way_the_command_line_promises() -> None:
    assert named("logits") == ["logits"]
    assert named("hidden.tok@6") == ["hidden.tok@6"]
    assert named("hidden.tok@4+6") == ["hidden.tok@4", "hidden.tok@6"]
    assert named("hidden.cls@1-3") == ["hidden.cls@1", "hidden.cls@2", "hidden.cls@3"]
    assert named("hidden.mean@all", 2) == ["hidden.mean@0", "hidden.mean@1", "hidden.mean@2"]
    assert named("hidden.tok@last") == ["hidden.tok@6"]
    assert named(" logits , hidden.cls@0-1+5 ") == ["logits", "hidden.cls@0", "hidden.cls@1", "hidden.cls@5"]


def test_a_signal_named_twice_is_kept_once_in_its_first_place() -> None:
    assert named("hidden.tok@2,logits,hidden.tok@1-2,logits") == ["hidden.tok@2", "logits", "hidden.tok@1"]


@given(
    st.lists(
        st.builds(Signal, st.just("hidden.tok"), st.integers(0, 12), st.sampled_from([None, *ENCODINGS]))
        | st.builds(Signal, st.just("logits"), st.none(), st.sampled_from([None, *ENCODINGS])),
        unique=True,
        min_size=1,
    )
)
def test_signals_written_as_a_list_are_read_as_they_were(signals: list[Signal]) -> None:
    assert list(parse_signals(format_signals(signals), 12)) == signals
    assert [Signal.parse(str(signal)) for signal in signals] == signals


def test_layers_side_by_side_are_written_as_a_range() -> None:
    assert format_signals(parse_signals("hidden.cls@all,logits,hidden.tok@1-2+4:int8", 6)) == (
        "hidden.cls@0-6,logits,hidden.tok@1+2+4:int8"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("logits:int4", "unknown encoding 'int4'.*did you mean 'int8'"),
        ("hidden.tok@1:", "unknown encoding ''"),
        ("hidden.tok:int8@1", "unknown encoding 'int8@1'"),
        ("token_ids:int8", "always stored"),
        ("logit", "did you mean 'logits'"),
        ("hidden.tokens@3", "did you mean 'hidden.tok'"),
        ("hidden.tok", "needs a layer"),
        ("logits@3", "has no layers"),
        ("logits@", "has no layers"),
        ("hidden.tok@", "cannot read layers"),
        ("hidden.tok@7", "layers 0 to 6, got 7"),
        ("hidden.tok@5-7", "layers 0 to 6, got 7"),
        ("hidden.tok@4-2", "run backwards"),
        ("hidden.tok@-1", "cannot read layers"),
        ("hidden.tok@1,,logits", "empty signal name"),
        ("", "empty signal name"),
        ("token_ids", "always stored"),
        ("../../etc/passwd", "unknown signal"),
        ("attention.relation@12", "is not stored(?s:.*)attention.qkv@LAYER: relations of any number of heads follow"),
        ("attention.probability@2", "is not stored(?s:.*)attention.score@LAYER: probabilities follow"),
        ("attention.score@0", "layers 1 to 6"),
        ("attention.score@0-3", "layers 1 to 6"),
    ],
)
def test_a_bad_list_of_signals_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_signals(text, 6)


def test_all_layers_of_attention_are_the_blocks_and_embedding_is_the_lowest_hidden_state() -> None:
    assert [str(signal) for signal in parse_signals("attention.score@all,embedding", 2)] == [
        "attention.score@1",
        "attention.score@2",
        "hidden.tok@0",
    ]
    with pytest.raises(UsageError, match=r"numbered 1 \(the first block\) to 999"):
        Signal("attention.qkv", 0)


def test_every_signal_survives_its_text_and_its_path() -> None:
    for name, kind in {**SIGNALS, **INPUTS}.items():
        for layer in (kind.first_layer, 6, 99, 123) if kind.per_layer else (None,):
            signal = Signal(name, layer)
            assert Signal.parse(str(signal)) == signal
            dtype = "uint8" if name in INPUTS else "float32"
            spec = ArraySpec(signal, (3,) * len(kind.dims), dtype)
            assert ArraySpec.at(spec.path, spec.shape, dtype, spec.encoding) == spec
    assert array_spec(Signal("hidden.tok", 6), 4).path == "hidden.tok/06"


@pytest.mark.parametrize(
    "path", ["", "logits/00", "hidden.tok", "hidden.tok/6", "hidden.tok/006", "hidden.tok/../x", "../logits", "/logits"]
)
def test_only_paths_of_arrays_name_signals(path: str) -> None:
    with pytest.raises(ValueError, match="no signal lives at"):
        ArraySpec.at(path, (3,), "float32", "float32")


def test_specs_say_how_a_signal_is_laid_out() -> None:
    spec = array_spec(Signal("hidden.tok", 6), 384)
    assert (spec.axis, spec.shape, spec.dtype, spec.dims) == ("token", (384,), "float16", ("token", "hidden"))
    assert spec.entry_bytes == 768
    assert array_spec(Signal("logits"), 3).dtype == "float32"


@pytest.mark.parametrize(
    ("signal", "shape", "dtype"),
    [
        (Signal("logits"), (3,), "float64"),
        (Signal("logits"), (3,), "uint8"),
        (Signal("logits"), (0,), "float32"),
        (Signal("logits"), (), "float32"),
        (Signal("logits"), (3, 3), "float32"),
        (Signal("token_ids"), (), "float32"),
        (Signal("token_ids"), (2,), "uint16"),
    ],
)
def test_specs_that_cannot_be_stored_are_refused(signal: Signal, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(UsageError, match=str(signal)):
        ArraySpec(signal, shape, dtype)
    with pytest.raises(UsageError, match="unknown encoding"):
        ArraySpec(Signal("logits"), (3,), "float32", "zip")


def test_the_catalogue_of_signals_loads_without_numpy() -> None:
    code = "import sys; from kd.pipeline.store import SIGNALS; assert SIGNALS; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
