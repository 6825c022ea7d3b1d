"""The forward loop: rows of token ids in, teacher signals out. It opens nothing and stores nothing.

Dimension key: B rows of a batch, T padded length, H hidden width, K tokens of a batch without padding, M slots of a row
for masked tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged
from ...pipeline.store.codec import LIMITS
from ...pipeline.store.keys import row_keys
from ...pipeline.store.signal import Signal
from ..derivation import at_positions, scores, with_last_hidden_state
from ..masking import Masking
from .attention import hook_maps, layer_modules, require_true_scores

BATCH_COST = 32
"""One batch more is worth as much as a 32nd of a full batch's tokens less: what it costs whatever its size."""
TRIAL_TOKENS = 8


@dataclass(frozen=True)
class SignalBatch:
    """What the teacher said about some rows.

    Attributes:
        slots: which rows, int64 [B].
        values: per example [B, ...]; per token [K, ...], the rows' tokens one after another without padding; per pair
            of tokens [P, ...], n * n of a row of n tokens.
    """

    slots: np.ndarray
    values: Mapping[Signal, np.ndarray]


def plan_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Rows of one shard as batches of slots: longest first, at most `batch_tokens` tokens each, next to no padding.

    The sorted rows are cut where one length ends and a shorter one begins, at the places that make padded tokens and
    the number of batches together cost least. It follows from the arguments alone, so a shard computed again has the
    same batches and the same bytes. Longest first: what does not fit into memory shows at once.

    Args:
        lengths: tokens per row, int [N].
        batch_tokens: budget of rows times longest row; a single longer row is a batch of its own.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    ascending, counts = np.unique(lengths, return_counts=True)
    widths, ends = ascending[::-1], np.concatenate([[0], np.cumsum(counts[::-1])])
    rows_per_batch = np.maximum(1, batch_tokens // np.maximum(widths, 1))
    # Of the rows at least as long as widths[i - 1]: the least cost, and where the last cut is then.
    least, cut = np.zeros(len(ends), dtype=np.int64), np.zeros(len(ends), dtype=np.int64)
    for end in range(1, len(ends)):
        rows = ends[end] - ends[:end]
        batches = -(-rows // rows_per_batch[:end])
        cost = least[:end] + rows * widths[:end] + batches * (batch_tokens // BATCH_COST + 1)
        cut[end] = np.argmin(cost)
        least[end] = cost[cut[end]]
    planned: list[np.ndarray] = []
    end = len(widths)
    while end > 0:
        start = int(cut[end])
        rows_here = order[ends[start] : ends[end]]
        planned[:0] = np.array_split(rows_here, -(-len(rows_here) // int(rows_per_batch[start])))
        end = start
    return planned


class Runner:
    """A teacher on a device, giving exactly the signals asked for.

    Hidden states are taken by hooks as the layers produce them, reduced or stripped of padding on the device, and
    dropped: what a batch keeps in memory is what it returns.

    Args:
        model: in evaluation mode.
        signals: what to give, with the dtype to give it in ("float32", "float16").
        device: where to run.
        pad_token_id: what fills up a row; masked, so its value does not matter.
        masking: how rows are masked before the teacher, a masked LM, reads them.
    """

    def __init__(
        self,
        model: nn.Module,
        signals: Mapping[Signal, str],
        *,
        device: str = "cpu",
        pad_token_id: int = 0,
        masking: Masking | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.num_halved = 0
        self._signals = {signal: getattr(torch, dtype) for signal, dtype in signals.items()}
        self._pad_token_id = pad_token_id
        takes = inspect.signature(model.forward).parameters
        self._takes_segments = "token_type_ids" in takes
        self._mask_is_optional = "attention_mask" in takes and takes["attention_mask"].default is None
        self._masking = masking
        last = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
        self._reduced = {s: last if s.layer is None else s.layer for s in signals if s.name in REDUCE}
        self._layers = sorted({*self._reduced.values()})
        self._states: dict[Signal, Tensor] = {}
        self._batch: _Batch | None = None
        self._hooks = self._watch() if self._layers else []
        self._taps_layers = bool(self._hooks) or not self._layers
        self._with_pairs = any(signal.kind.axis == "pair" for signal in signals)
        self._attention_hooks = self._watch_attention()
        self._called = self.model
        if masking is not None:
            encoder: Any = self.model.base_model
            if Signal("mlm.logits") in signals:
                # The head is computed where it is asked for: a seventh of the tokens.
                self._hooks += [encoder.register_forward_hook(lambda *_: self._at_masked(_[2]))]
            else:
                self._called = encoder

    def run(self, token_ids: Ragged, segment_ids: Ragged, batches: Sequence[np.ndarray]) -> Iterator[SignalBatch]:
        """Yield each batch's signals; on a GPU the next batch is under way while one is handed out.

        Args:
            token_ids: ids per row.
            segment_ids: segment of every token, same lengths; ignored by models without segments.
            batches: slots (indices of rows) per batch, as `plan_batches` gives.

        Raises:
            RefusedError: one row alone does not fit into memory.
        """
        under_way: list[_Launched] = []
        for slots in [*batches, None]:
            launched = [] if slots is None else self._launch(token_ids, segment_ids, slots)
            for done in under_way:
                if done.overflows():
                    # Once more as it is, so that whoever stores it can name the row and the value.
                    done = self._forward(token_ids, segment_ids, done.slots, done.length, as_computed=True)
                yield done.arrived()
            under_way = launched

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in (*self._hooks, *self._attention_hooks):
            hook.remove()
        self._hooks, self._attention_hooks = [], []

    # --- one batch -----------------------------------------------------------------------------------------------

    def _launch(
        self, token_ids: Ragged, segment_ids: Ragged, slots: np.ndarray, length: int | None = None
    ) -> list[_Launched]:
        """Start one batch, or several smaller ones when it does not fit into memory."""
        try:
            return [self._forward(token_ids, segment_ids, slots, length)]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            longest = int(token_ids.lengths[slots].max())
            if len(slots) == 1:
                raise RefusedError(
                    f"one row of {longest} tokens does not fit into the memory of {self.device}",
                    details=[str(error).splitlines()[0][:200]],
                    fix="use a device with more memory, or a store with a smaller --max-length",
                ) from error
        self._states.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.num_halved += 1
        half = len(slots) // 2
        # The padded length stays, so that halving changes a row's result as little as possible.
        return [
            *self._launch(token_ids, segment_ids, slots[:half], length or longest),
            *self._launch(token_ids, segment_ids, slots[half:], length or longest),
        ]

    @torch.inference_mode()
    def _forward(
        self,
        token_ids: Ragged,
        segment_ids: Ragged,
        slots: np.ndarray,
        length: int | None,
        *,
        as_computed: bool = False,
    ) -> _Launched:
        lengths = token_ids.lengths[slots]
        inside_BT = np.arange(length or int(lengths.max())) < lengths[:, None]
        batch = self._batch = _Batch.of(inside_BT, self.device, pairs=self._with_pairs)
        ids_BT = self._padded(token_ids, slots, inside_BT, self._pad_token_id)
        if self._masking is not None:
            keys = row_keys(token_ids.take(slots), segment_ids.take(slots))
            masked = self._masking.apply(ids_BT.numpy(), lengths, keys)
            ids_BT.copy_(torch.from_numpy(masked.ids_BT))
            batch.positions_BM = torch.from_numpy(masked.positions_BM).to(self.device)
        inputs = {"input_ids": ids_BT.to(self.device, non_blocking=True)}
        if batch.token_index_K is not None or not self._mask_is_optional:
            # Without padding there is none: models ask a mask whether it masks, which on a GPU waits for all before it.
            inputs["attention_mask"] = batch.mask_BT
        if self._takes_segments:
            segments_BT = self._padded(segment_ids, slots, inside_BT, 0)
            inputs["token_type_ids"] = segments_BT.to(self.device, non_blocking=True)
        self._states.clear()
        output = self._called(**inputs, return_dict=True, output_hidden_states=not self._taps_layers)
        if not self._taps_layers:
            for layer in self._layers:
                self._keep(layer, output.hidden_states[layer])
        values, extremes = {}, []
        for signal, dtype in self._signals.items():
            value: Tensor
            if signal.name == "logits.tok":
                value = every_token(output.logits, batch)
            else:
                value = output.logits if signal.name.endswith("logits") else self._states[signal]
            if signal.name == "mlm.logits":
                assert batch.positions_BM is not None
                value = value * (batch.positions_BM >= 0)[..., None]
            if as_computed:
                dtype = torch.float32
            elif dtype == torch.float16 and value.dtype != torch.float16:
                extremes.append(torch.stack(torch.aminmax(value)).float())
            values[signal] = self._to_host(value.to(dtype))
        self._states.clear()
        self._batch = None
        largest = self._to_host(torch.stack(extremes).abs()) if extremes else None
        event: Any = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
        return _Launched(slots, length, values, largest, event)

    def _padded(self, rows: Ragged, slots: np.ndarray, inside_BT: np.ndarray, fill: int) -> Tensor:
        """Rows as int64 [B, T], in memory that a GPU copies from by itself."""
        padded_BT = torch.full(inside_BT.shape, fill, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        padded_BT.numpy()[inside_BT] = rows.take(slots).values
        return padded_BT

    def _to_host(self, values: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return values.cpu()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    # --- hidden states -------------------------------------------------------------------------------------------

    def _keep(self, layer: int, hidden_BTH: Tensor) -> None:
        """Reduce one layer's hidden states to the signals asked of it, and forget them."""
        if self._batch is None:
            return  # somebody else runs the model
        for signal, its_layer in self._reduced.items():
            if its_layer == layer:
                self._states[signal] = REDUCE[signal.name](hidden_BTH, self._batch)

    def _at_masked(self, output: Any) -> Any:
        """What the encoder gave, cut to the masked tokens for the head."""
        if self._batch is None or self._batch.positions_BM is None:
            return output  # somebody else runs the model
        return with_last_hidden_state(output, masked_tokens(output[0], self._batch))

    def _watch(self) -> list[Any]:
        """Hook the layers asked for; nothing when the model's layers cannot be told for certain.

        Hidden state 0 is the input of the first layer, i the output of layer i. That is tried out on a few tokens
        against the model's own `hidden_states`: some models normalise the last one after its layer, or share layers.
        """
        blocks = layer_modules(self.model)
        if blocks is None:
            return []
        config: Any = self.model.config
        seen: dict[int, Tensor] = {}
        trial = _hook_layers(blocks, range(len(blocks) + 1), lambda layer, hidden: seen.__setitem__(layer, hidden))
        try:
            with torch.inference_mode():
                ids_BT = torch.arange(TRIAL_TOKENS, device=self.device)[None, :] % int(config.vocab_size)
                mask_BT = torch.ones_like(ids_BT)
                output = self.model(
                    input_ids=ids_BT, attention_mask=mask_BT, return_dict=True, output_hidden_states=True
                )
        finally:
            for hook in trial:
                hook.remove()
        expected = output.hidden_states
        agree = len(expected) == len(blocks) + 1 and all(
            layer in seen and torch.equal(seen[layer], hidden)
            for layer, hidden in enumerate(expected)
            if layer in self._layers
        )
        return _hook_layers(blocks, self._layers, self._keep) if agree else []

    # --- attention -----------------------------------------------------------------------------------------------

    def _watch_attention(self) -> list[Any]:
        """Hook the query, key and value maps of the layers asked for.

        Raises:
            RefusedError: the model has no such maps, or its scores are not what follows from them.
        """
        scored = {s.layer: False for s in self._signals if s.name == "attention.score" and s.layer is not None}
        mapped = {s.layer: True for s in self._signals if s.name == "attention.qkv" and s.layer is not None}
        if scored:
            require_true_scores(self.model, scored, self.device)
        return hook_maps(self.model, scored | mapped, self._keep_attention)

    def _keep_attention(self, layer: int, maps_BTD: tuple[Tensor, ...]) -> None:
        """Reduce what the maps of one layer gave to the signals asked of it, and forget it."""
        if self._batch is None:
            return
        score, qkv = Signal("attention.score", layer), Signal("attention.qkv", layer)
        if score in self._signals:
            heads = int(self.model.config.num_attention_heads)  # type: ignore[union-attr,arg-type]
            self._states[score] = every_pair(scores(maps_BTD[0], maps_BTD[1], heads), self._batch)
        if qkv in self._signals:
            self._states[qkv] = every_token(torch.stack(maps_BTD, dim=2), self._batch)


@dataclass(frozen=True)
class _Launched:
    """A batch whose values are on their way to the host.

    Attributes:
        slots: which rows.
        length: padded to, when it was not the longest row's.
        values: per signal.
        largest: magnitudes of the lowest and highest values of what became float16, [signals, 2].
        event: on a GPU, what happens once they have arrived.
    """

    slots: np.ndarray
    length: int | None
    values: Mapping[Signal, Tensor]
    largest: Tensor | None
    event: Any

    def overflows(self) -> bool:
        """Whether a finite value became infinite in float16."""
        if self.largest is None:
            return False
        self._wait()
        largest = self.largest.numpy()
        return bool((np.isfinite(largest) & (largest >= LIMITS["float16"])).any())

    def arrived(self) -> SignalBatch:
        self._wait()
        return SignalBatch(self.slots, {signal: tensor.numpy() for signal, tensor in self.values.items()})

    def _wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


@dataclass
class _Batch:
    """What the reductions need to know of a batch, on its device."""

    mask_BT: Tensor
    lengths_B: Tensor
    token_index_K: Tensor | None
    pair_index_P: Tensor | None = None
    positions_BM: Tensor | None = None

    @classmethod
    def of(cls, inside_BT: np.ndarray, device: torch.device, *, pairs: bool = False) -> _Batch:
        """From where the tokens are, bool [B, T].

        Args:
            pairs: whether pairs of tokens are needed too.
        """
        index = None if inside_BT.all() else torch.from_numpy(np.flatnonzero(inside_BT))
        pair_index = None
        if pairs and index is not None:
            pair_index = torch.from_numpy(np.flatnonzero(inside_BT[:, :, None] & inside_BT[:, None, :]))
        return cls(
            mask_BT=torch.from_numpy(inside_BT.astype(np.int64)).to(device, non_blocking=True),
            lengths_B=torch.from_numpy(inside_BT.sum(axis=1)).to(device, non_blocking=True),
            token_index_K=None if index is None else index.to(device, non_blocking=True),
            pair_index_P=None if pair_index is None else pair_index.to(device, non_blocking=True),
        )


def first_token(hidden_BTH: Tensor, batch: _Batch) -> Tensor:
    """Hidden state of each row's first token, [B, H]."""
    return hidden_BTH[:, 0].clone()


def mean_of_tokens(hidden_BTH: Tensor, batch: _Batch) -> Tensor:
    """Mean over each row's tokens, special ones too and padding not, float32 [B, H]."""
    weights_B1T = batch.mask_BT.to(torch.float32)[:, None, :]
    return torch.bmm(weights_B1T, hidden_BTH.float())[:, 0] / batch.lengths_B[:, None]


def every_token(hidden_BTH: Tensor, batch: _Batch) -> Tensor:
    """Hidden states of all tokens without padding, row after row, [K, H]."""
    flat = hidden_BTH.flatten(0, 1)
    # A copy either way: a later layer may write into its input.
    return flat.clone() if batch.token_index_K is None else flat.index_select(0, batch.token_index_K)


def every_pair(scores_BHTT: Tensor, batch: _Batch) -> Tensor:
    """Scores of all pairs of tokens without padding, row after row, by the token that attends, [P, H]."""
    flat = scores_BHTT.permute(0, 2, 3, 1).flatten(0, 2)
    return flat.contiguous() if batch.pair_index_P is None else flat.index_select(0, batch.pair_index_P)


def masked_tokens(hidden_BTH: Tensor, batch: _Batch) -> Tensor:
    """Hidden states of the masked tokens, [B, M, H]; zeros in slots that are not used."""
    assert batch.positions_BM is not None
    return at_positions(hidden_BTH, batch.positions_BM)


REDUCE: dict[str, Callable[[Tensor, _Batch], Tensor]] = {
    "hidden.cls": first_token,
    "hidden.mean": mean_of_tokens,
    "hidden.tok": every_token,
    "mlm.hidden": masked_tokens,
}


def _hook_layers(
    blocks: Sequence[nn.Module], layers: Sequence[int], keep: Callable[[int, Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    def before_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            keep(layer, output if isinstance(output, Tensor) else output[0])

        return hook

    return [
        blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
        if layer == 0
        else blocks[layer - 1].register_forward_hook(after(layer))
        for layer in layers
    ]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
