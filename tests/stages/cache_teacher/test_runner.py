"""The forward loop against plain transformers: same numbers, only what was asked for, any kind of encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import Signal
from kd.stages.cache_teacher import runner as runner_module
from kd.stages.cache_teacher.runner import Runner, plan_batches

VOCABULARY = 90
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": 3}
CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, **SMALL
    ),
    "roberta": lambda: transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, pad_token_id=1, **SMALL
    ),
    "distilbert": lambda: transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **SMALL),
    "electra": lambda: transformers.ElectraConfig(
        embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **SMALL
    ),
    "albert": lambda: transformers.AlbertConfig(
        embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, **SMALL
    ),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, pooler_hidden_size=16, **SMALL
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **SMALL,
    ),
    "mobilebert": lambda: transformers.MobileBertConfig(
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        intra_bottleneck_size=16,
        **SMALL,
    ),
}


def model_of(kind: str = "bert", seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CONFIGS[kind]()
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.2)
            # As after training; MobileBERT mixes each token with its neighbours before padding is masked.
            model.get_input_embeddings().weight[config.pad_token_id].zero_()
    return model


def rows_of(lengths: Sequence[int], seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.from_lengths(rng.integers(3, VOCABULARY, size=sum(lengths)), lengths)


def zeros_like(rows: Ragged) -> Ragged:
    return Ragged.from_lengths(np.zeros(len(rows.values), dtype=np.uint8), rows.lengths)


def signals_of(*texts: str, dtype: str = "float32") -> dict[Signal, str]:
    return {Signal.parse(text): dtype for text in texts}


def collect(runner: Runner, rows: Ragged, batches: list[np.ndarray]) -> dict[Signal, list[np.ndarray]]:
    """Per signal, each row's values in order of the rows."""
    found: dict[Signal, dict[int, np.ndarray]] = {}
    for batch in runner.run(rows, zeros_like(rows), batches):
        lengths = rows.lengths[batch.slots]
        for signal, values in batch.values.items():
            parts = (
                np.split(values, np.cumsum(lengths)[:-1]) if signal.kind.axis == "token" else [row for row in values]
            )
            found.setdefault(signal, {}).update(zip(batch.slots.tolist(), parts, strict=True))
    return {signal: [parts[row] for row in range(len(rows))] for signal, parts in found.items()}


def alone(model: Any, ids: np.ndarray) -> Any:
    """The oracle: one row, no padding, plain transformers."""
    with torch.inference_mode():
        return model(
            input_ids=torch.from_numpy(ids)[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            output_hidden_states=True,
        )


@pytest.fixture(autouse=True)
def fixed_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- batches -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 400))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(np.array(lengths, dtype=np.int64), budget)
    assert sorted(np.concatenate([np.empty(0, dtype=int), *batches]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


def test_batches_come_longest_first_and_equal_lengths_in_order() -> None:
    batches = plan_batches(np.array([3, 9, 3, 20, 9]), 48)
    assert [batch.tolist() for batch in batches] == [[3], [1, 4], [0, 2]]


def test_rows_of_one_length_share_batches_of_about_the_same_size() -> None:
    batches = plan_batches(np.full(10, 8), 32)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_a_few_shorter_rows_are_padded_rather_than_given_a_batch_of_their_own() -> None:
    lengths = np.array([*[20] * 40, 19, *[10] * 40])
    # 64 tokens are a 32nd of the budget: one token of padding is less, 10 a row are more.
    assert [len(batch) for batch in plan_batches(lengths, 2048)] == [41, 40]
    assert [len(batch) for batch in plan_batches(np.array([20] * 3 + [10]), 2048)] == [4]


def _tokens_and_batches(batches: list[np.ndarray], lengths: np.ndarray) -> tuple[int, int]:
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches), len(batches)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(9, 64))
def test_no_other_cuts_between_lengths_cost_less(lengths: list[int], budget: int) -> None:
    rows = np.sort(np.array(lengths))[::-1]
    own = budget // runner_module.BATCH_COST + 1
    tokens, number = _tokens_and_batches(plan_batches(rows, budget), rows)
    for cuts in product([False, True], repeat=len(rows) - 1):
        if any(cut and rows[at] == rows[at + 1] for at, cut in enumerate(cuts)):
            continue
        parts = np.split(np.arange(len(rows)), np.flatnonzero(cuts) + 1)
        if all(len(part) * rows[part[0]] <= budget for part in parts):
            assert tokens + own * number <= sum(len(part) * rows[part[0]] + own for part in parts)


def test_sorted_sentences_leave_next_to_no_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(4 + rng.gamma(2.0, 5.0, size=4096).astype(np.int64), 60)
    tokens, number = _tokens_and_batches(plan_batches(lengths, 2048), lengths)
    assert tokens <= 1.02 * lengths.sum() and number <= 1.6 * lengths.sum() / 2048


# --- against transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_signal_of_every_layer_equals_the_row_alone(kind: str) -> None:
    model = model_of(kind)
    layers = model.config.num_hidden_layers
    wanted = [f"{name}@{i}" for name in ("hidden.cls", "hidden.mean", "hidden.tok") for i in range(layers + 1)]
    rows = rows_of([5, 17, 8, 1, 16, 30, 2])
    runner = Runner(model, signals_of("logits", *wanted))
    found = collect(runner, rows, plan_batches(rows.lengths, 64))
    for row, ids in enumerate(rows):
        expected = alone(model, ids)
        np.testing.assert_allclose(found[Signal("logits")][row], expected.logits[0], rtol=1e-4, atol=2e-5)
        for layer in range(layers + 1):
            hidden = expected.hidden_states[layer][0].numpy()
            for name, value in (
                ("hidden.tok", hidden),
                ("hidden.cls", hidden[0]),
                ("hidden.mean", hidden.mean(axis=0)),
            ):
                got = found[Signal(name, layer)][row]
                np.testing.assert_allclose(got, value, rtol=1e-4, atol=2e-5, err_msg=f"{name}@{layer}, row {row}")


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2"])
def test_hooks_are_used_where_layers_can_be_told(kind: str) -> None:
    assert len(Runner(model_of(kind), signals_of("hidden.cls@0", "hidden.cls@1"))._hooks) == 2


def test_a_layer_that_is_normalised_afterwards_is_taken_from_the_models_own_states() -> None:
    model = model_of("modernbert")
    assert Runner(model, signals_of("hidden.cls@1"))._hooks
    assert not Runner(model, signals_of("hidden.cls@1", "hidden.cls@3"))._hooks


def test_a_batch_is_bit_for_bit_what_transformers_gives_for_it() -> None:
    model = model_of()
    rows = rows_of([5, 17, 8, 16])
    order = [1, 3, 2, 0]
    found = collect(Runner(model, signals_of("logits", "hidden.tok@2")), rows, [np.array(order)])
    ids = torch.zeros(4, 17, dtype=torch.int64)
    mask = torch.zeros(4, 17, dtype=torch.int64)
    for place, row in enumerate(order):
        ids[place, : rows.lengths[row]] = torch.from_numpy(rows[row])
        mask[place, : rows.lengths[row]] = 1
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for place, row in enumerate(order):
        assert np.array_equal(found[Signal("logits")][row], expected.logits[place].numpy())
        hidden = expected.hidden_states[2][place, : rows.lengths[row]].numpy()
        assert np.array_equal(found[Signal("hidden.tok", 2)][row], hidden)


def test_segments_reach_the_model() -> None:
    model = model_of()
    rows = rows_of([6])
    segments = Ragged.from_lengths(np.array([0, 0, 0, 1, 1, 1], dtype=np.uint8), [6])
    runner = Runner(model, signals_of("logits"))
    (batch,) = runner.run(rows, segments, [np.array([0])])
    with torch.inference_mode():
        expected = model(
            input_ids=torch.from_numpy(rows[0])[None],
            token_type_ids=torch.from_numpy(segments[0].astype(np.int64))[None],
        ).logits
    np.testing.assert_allclose(batch.values[Signal("logits")], expected, atol=1e-6)
    assert not np.allclose(batch.values[Signal("logits")], alone(model, rows[0]).logits, atol=1e-3)


def test_what_fills_a_row_up_does_not_matter() -> None:
    model = model_of()
    rows = rows_of([3, 11])
    a = collect(Runner(model, signals_of("logits", "hidden.mean@3"), pad_token_id=0), rows, [np.arange(2)])
    b = collect(Runner(model, signals_of("logits", "hidden.mean@3"), pad_token_id=77), rows, [np.arange(2)])
    for signal in a:
        np.testing.assert_allclose(a[signal], b[signal], atol=1e-6)


def test_padding_never_exceeds_the_longest_row() -> None:
    config = CONFIGS["bert"]()
    config.max_position_embeddings = 13
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    rows = rows_of([13, 4])
    found = collect(Runner(model, signals_of("logits")), rows, [np.arange(2)])
    np.testing.assert_allclose(found[Signal("logits")][0], alone(model, rows[0]).logits[0], atol=1e-6)


def test_dropout_is_off_whatever_mode_the_model_came_in() -> None:
    model = model_of()
    rows = rows_of([9, 9])
    expected = collect(Runner(model, signals_of("logits")), rows, [np.arange(2)])
    again = collect(Runner(model.train(), signals_of("logits")), rows, [np.arange(2)])
    assert np.array_equal(expected[Signal("logits")], again[Signal("logits")])


def test_only_what_was_asked_for_is_given_in_the_dtype_asked_for() -> None:
    rows = rows_of([9, 4])
    runner = Runner(model_of(), signals_of("logits") | signals_of("hidden.cls@1", dtype="float16"))
    (batch,) = runner.run(rows, zeros_like(rows), [np.arange(2)])
    assert {str(s): v.dtype.name for s, v in batch.values.items()} == {"logits": "float32", "hidden.cls@1": "float16"}


def test_a_closed_runner_leaves_the_model_without_its_hooks() -> None:
    model = model_of()

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    alone(model, np.arange(5))  # transformers hooks the layers itself when it is asked for hidden states
    before = hooks()
    runner = Runner(model, signals_of("hidden.cls@0", "hidden.cls@1"))
    assert hooks() == before + 2
    runner.close()
    assert hooks() == before


def test_two_runners_of_one_model_do_not_disturb_each_other() -> None:
    model = model_of()
    rows = rows_of([9, 4])
    first, second = Runner(model, signals_of("hidden.mean@1")), Runner(model, signals_of("hidden.mean@1"))
    batches = [np.arange(2)]
    found = [collect(runner, rows, batches)[Signal("hidden.mean", 1)] for runner in (first, second, first)]
    alone(model, rows[0])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])


def test_bfloat16_teachers_give_numbers_numpy_knows() -> None:
    rows = rows_of([9, 4])
    runner = Runner(
        model_of().bfloat16(), signals_of("logits") | signals_of("hidden.tok@1", "hidden.mean@1", dtype="float16")
    )
    (batch,) = runner.run(rows, zeros_like(rows), [np.arange(2)])
    assert all(np.isfinite(values.astype(np.float32)).all() for values in batch.values.values())


# --- what goes wrong ---------------------------------------------------------------------------------------------


class Hungry(torch.nn.Module):
    """A model that runs out of memory on more than `limit` rows."""

    def __init__(self, model: Any, limit: int, error: Exception) -> None:
        super().__init__()
        self.model, self.config, self.limit, self.error = model, model.config, limit, error
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > self.limit:
            raise self.error
        self.seen.append(tuple(input_ids.shape))
        return self.model(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch_and_keeps_the_padded_length(error: Exception) -> None:
    model = model_of()
    rows = rows_of([20, 3, 5, 4, 2])
    hungry = Hungry(model, 2, error)
    runner = Runner(hungry, signals_of("logits"))
    found = collect(runner, rows, [np.arange(5)])
    assert hungry.seen == [(2, 20), (1, 20), (2, 20)]
    assert runner.num_halved == 2
    for row, ids in enumerate(rows):
        np.testing.assert_allclose(found[Signal("logits")][row], alone(model, ids).logits[0], atol=1e-5)


def test_one_row_that_does_not_fit_is_refused_with_its_length() -> None:
    runner = Runner(Hungry(model_of(), 0, torch.OutOfMemoryError("no")), signals_of("logits"))
    rows = rows_of([20, 3])
    with pytest.raises(RefusedError, match="one row of 20 tokens does not fit into the memory of cpu"):
        collect(runner, rows, [np.arange(2)])


def test_other_errors_of_the_model_pass_through() -> None:
    runner = Runner(Hungry(model_of(), 0, RuntimeError("shapes do not match")), signals_of("logits"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        collect(runner, rows_of([4]), [np.arange(1)])


def test_what_float16_cannot_hold_is_handed_over_as_it_is() -> None:
    model = model_of()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.mul_(1e5)
    rows = rows_of([9, 4])
    runner = Runner(model, signals_of("logits", "hidden.tok@1", "hidden.tok@2", dtype="float16"))
    (batch,) = runner.run(rows, zeros_like(rows), [np.arange(2)])
    values = batch.values[Signal("hidden.tok", 2)]
    assert values.dtype == np.float32
    assert np.isfinite(values).all() and np.abs(values).max() > 65520
    np.testing.assert_allclose(values[:9], alone(model, rows[0]).hidden_states[2][0], rtol=1e-4, atol=1)


def test_not_a_number_is_handed_over_too() -> None:
    model = model_of()
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    rows = rows_of([9])
    (batch,) = Runner(model, signals_of("logits")).run(rows, zeros_like(rows), [np.arange(1)])
    assert np.isnan(batch.values[Signal("logits")][0]).tolist() == [False, True, False]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 60))
def test_any_batching_gives_the_same_rows(lengths: list[int], budget: int) -> None:
    model = model_of()
    rows = rows_of(lengths)
    one_by_one = collect(
        Runner(model, signals_of("logits", "hidden.mean@2")), rows, [np.array([r]) for r in range(len(rows))]
    )
    batched = collect(Runner(model, signals_of("logits", "hidden.mean@2")), rows, plan_batches(rows.lengths, budget))
    for signal in batched:
        np.testing.assert_allclose(batched[signal], one_by_one[signal], rtol=1e-4, atol=1e-5)


def test_reductions_exist_for_every_hidden_state() -> None:
    from kd.pipeline.store import SIGNALS

    assert set(runner_module.REDUCE) == {name for name in SIGNALS if "hidden" in name.split(".")}
