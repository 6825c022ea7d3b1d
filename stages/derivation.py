"""Signals computed from others, as `pipeline/store/lattice.py` lays down: in one place, on the device the batch is on.

Dimension key: B rows, T padded length, D hidden width, H heads, d width of a head, L the last layer, M slots of a row
for masked tokens, P masked tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pipeline.errors import RefusedError, VerificationError
from ..pipeline.fingerprint import differing_fields
from ..pipeline.store.lattice import route_to
from ..pipeline.store.signal import Signal
from ..pipeline.store.store import TeacherStore
from .cache_teacher.sidecars import groups_of

NUM_TOKENS = "num_tokens"
"""Beside the signals of a batch that has tokens or pairs: int64 [B], how many each row has."""
POSITIONS = "positions"
"""Beside the signals of masked rows, and of words: int64 [B, M], which of the teacher's tokens are asked for; below 0
in slots that are not used."""

SidecarTensors = Callable[[str], Mapping[str, np.ndarray]]


class Derivation:
    """What a teacher's signals are derived with: its config, and sidecars that are read when they are needed.

    Args:
        config: the teacher's transformers config.
        head: what is on top of it: "sequence-classification", "token-classification", "masked-lm" or "none".
        tensors: gives the tensors of a sidecar by its name.
    """

    def __init__(self, config: Any, head: str, tensors: SidecarTensors) -> None:
        self._config, self._head, self._tensors = config, head, tensors
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(getattr(config, "num_attention_heads", 0) or 0)
        self._kept: dict[tuple[str, torch.device], Any] = {}

    def of(self, stored: Mapping[str, Tensor]) -> DerivedSignals:
        """The signals of one batch, stored and derived.

        Args:
            stored: tensors by `str(signal)`, zeros after a row's end, and `NUM_TOKENS` where rows have tokens.
        """
        return DerivedSignals(self, stored)

    def derive(self, signal: Signal, batch: Mapping[str, Tensor]) -> Tensor:
        """One signal, float32, from those right below it in the lattice: [B, C], [B, D], [B, T, D], [B, T, 3, D] or
        [B, H, T, T]; zeros where a row has no tokens. Of masked tokens: states [B, M, D], and logits [P, V] row by row;
        logits of tokens [B, T, C], or [P, C] row by row of those that `POSITIONS` asks for.

        Raises:
            KeyError: nothing in the lattice leads to it.
        """
        route = route_to(signal, self.num_layers)
        if route is None:
            raise KeyError(str(signal))
        sources = [batch[str(source)] for source in route.sources]
        if signal.name == "hidden.cls":
            return sources[0][:, 0].float()
        if signal.name == "logits":
            return self._logits(sources[0].float())
        if signal.name == "mlm.hidden":
            return at_positions(sources[0].float(), batch[POSITIONS])
        if signal.name == "mlm.logits":
            return self._logits(sources[0].float()[batch[POSITIONS] >= 0])[:, 0]
        if signal.name == "logits.tok" and POSITIONS in batch:
            return self._logits(taken_at(sources[0], batch[POSITIONS]).float())[:, 0]
        mask_BT = _mask(batch[NUM_TOKENS], sources[0].shape[1])
        if signal.name == "logits.tok":
            logits_BTC = self._logits(sources[0].float().flatten(0, 1)).view(*mask_BT.shape, -1)
            return logits_BTC * mask_BT[..., None]
        if signal.name == "hidden.mean":
            return sources[0].float().sum(1) / mask_BT.sum(1, keepdim=True)
        if signal.name == "hidden.tok":
            return self._embedded(sources[0], sources[1], mask_BT)
        if signal.name == "attention.qkv":
            assert route.sidecar is not None
            return self._maps(sources[0].float(), route.sidecar) * mask_BT[..., None, None]
        return scores(sources[0][:, :, 0], sources[0][:, :, 1], self.num_heads) * (
            mask_BT[:, None, :, None] & mask_BT[:, None, None, :]
        )

    def _maps(self, hidden_BTD: Tensor, sidecar: str) -> Tensor:
        device, width = hidden_BTD.device, hidden_BTD.shape[-1]
        weights = self._keep(sidecar, device, lambda: self._maps_of(sidecar, width, device))
        return torch.stack(
            [
                nn.functional.linear(hidden_BTD, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
                for name in ("query", "key", "value")
            ],
            dim=2,
        )

    def _maps_of(self, sidecar: str, width: int, device: torch.device) -> dict[str, Tensor]:
        tensors = self._tensors(sidecar)
        heads = max(1, self.num_heads)
        # Heads are of one width.
        out = max(1, len(np.atleast_1d(tensors.get("query.weight", ()))) // heads) * heads
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, width) for name in ("query", "key", "value")}
        shapes |= {f"{name}.bias": (out,) for name in ("query", "key", "value") if f"{name}.bias" in tensors}
        _require_shapes(sidecar, tensors, shapes)
        return {name: torch.from_numpy(np.array(tensor)).to(device, torch.float32) for name, tensor in tensors.items()}

    def _embedded(self, ids_BT: Tensor, segments_BT: Tensor, mask_BT: Tensor) -> Tensor:
        model = self._keep("embeddings", ids_BT.device, lambda: self._without_layers("embeddings", ids_BT.device))
        padding = int(getattr(self._config, "pad_token_id", None) or 0)
        inputs = {
            # Positions of RoBERTa are counted from the ids that are not the padding's.
            "input_ids": ids_BT.long().masked_fill(~mask_BT, padding),
            "attention_mask": mask_BT.long(),
        }
        if takes_segments(model):
            inputs["token_type_ids"] = segments_BT.long()
        base = getattr(model, "base_model", model)
        hidden_BTD: Tensor = base(**inputs, return_dict=True).last_hidden_state
        return hidden_BTD * mask_BT[..., None]

    def _logits(self, first_BD: Tensor) -> Tensor:
        model = self._keep("head", first_BD.device, lambda: self._without_layers("head", first_BD.device))
        # The head reads what comes out of the layers: here there are none, and this takes its place.
        hook = _layer_list_owner(model).register_forward_hook(lambda *_: _replaced(_[2], first_BD[:, None]))
        try:
            ids_B1 = torch.zeros(len(first_BD), 1, dtype=torch.int64, device=first_BD.device)
            logits_BC: Tensor = model(input_ids=ids_B1, attention_mask=torch.ones_like(ids_B1), return_dict=True).logits
        finally:
            hook.remove()
        return logits_BC

    def _without_layers(self, sidecar: str, device: torch.device) -> nn.Module:
        """The teacher's own class without layers, with the tensors of a sidecar: transformers' code computes the rest.

        What else it has is random, and not used.
        """
        from .cache_teacher.teacher import auto_class

        config = copy.deepcopy(self._config)
        config.num_hidden_layers = 0
        if sidecar == "head" and self._head != "masked-lm":  # the word table is not read
            config.vocab_size = max(2, int(getattr(config, "pad_token_id", None) or 0) + 1)
        auto = auto_class(self._head)
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = auto.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        tensors, there = self._tensors(sidecar), model.state_dict()
        names = [name for name, group in groups_of(model).items() if group == sidecar]
        # Of what is lacking, the model would keep what it was drawn with, without a word.
        _require_shapes(sidecar, tensors, {name: tuple(there[name].shape) for name in names})
        model.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in names}, strict=False)
        return model.to(device)

    def _keep(self, name: str, device: torch.device, make: Callable[[], Any]) -> Any:
        if (name, device) not in self._kept:
            self._kept[name, device] = make()
        return self._kept[name, device]


def _require_shapes(sidecar: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """VerificationError unless a sidecar holds the tensors that the teacher's config makes, and no others."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        names = [name for name in sorted({*found, *shapes}) if found.get(name) != shapes.get(name)]
        raise VerificationError(
            f"sidecar {sidecar!r} does not fit the teacher's config that the store keeps beside it",
            details=[f"{name}: {found.get(name, 'not there')}, not {shapes.get(name, 'there')}" for name in names[:5]],
            fix="capture the signals themselves: kd cache-teacher --signals ...",
        )


def derivation_of(store: TeacherStore) -> Derivation:
    """The derivation by a store's own sidecars."""
    from transformers import AutoConfig

    from .cache_teacher.identity import behaviour_config

    folder = store.sidecar_folder("config")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever a kind says of values that are not its own
        raise RefusedError(
            f"the teacher's config.json that store {store.url} keeps cannot be read, and signals are derived by it",
            details=[str(error).splitlines()[0][:200]],
            fix="capture the signals themselves: kd cache-teacher --signals ...",
        ) from error
    said = store.identity.teacher.get("config")
    if said is not None and (changed := differing_fields(said, behaviour_config(config))):
        raise VerificationError(
            f"the config.json that store {store.url} keeps is not its teacher's, and signals are derived by it",
            details=changed,
            fix=f"see what else is wrong with: kd store audit {store.url} --teacher TEACHER",
        )
    return Derivation(config, str(store.identity.teacher.get("head")), store.sidecar)


class DerivedSignals(Mapping[str, Tensor]):
    """Signals of a batch by `str(signal)`: as stored, or derived when they are first asked for, without gradient."""

    def __init__(self, derivation: Derivation, stored: Mapping[str, Tensor]) -> None:
        self._derivation = derivation
        self._found = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            device_type = next(iter(self._found.values())).device.type
            # Under autocast the maps would be computed in the student's half precision.
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                self._found[name] = self._derivation.derive(Signal.parse(name), self)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def scores(query_BTD: Tensor, key_BTD: Tensor, num_heads: int) -> Tensor:
    """[B, H, T, T] query times key / sqrt(head width), float32: what a softmax over the last axis is taken of."""
    query_BHTd, key_BHTd = (_by_head(states.float(), num_heads) for states in (query_BTD, key_BTD))
    return query_BHTd @ key_BHTd.transpose(2, 3) / math.sqrt(query_BHTd.shape[-1])


def _by_head(states_BTD: Tensor, num_heads: int) -> Tensor:
    return states_BTD.reshape(*states_BTD.shape[:2], num_heads, -1).transpose(1, 2)


def at_positions(hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
    """[B, M, D] states of the tokens at some positions; zeros where a position is below 0."""
    index_BMD = positions_BM.clamp(min=0)[..., None].expand(-1, -1, hidden_BTD.shape[-1])
    return hidden_BTD.gather(1, index_BMD) * (positions_BM >= 0)[..., None]


def taken_at(values_BTD: Tensor, positions_BW: Tensor) -> Tensor:
    """[P, D] values of the tokens at some positions, row by row; positions below 0 ask for none.

    >>> taken_at(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1, -1], [0, 1]])).flatten().tolist()
    [2.0, 3.0, 4.0]
    """
    rows_P, slots_P = torch.nonzero(positions_BW >= 0, as_tuple=True)
    return values_BTD[rows_P, positions_BW[rows_P, slots_P]]


def with_last_hidden_state(output: Any, hidden: Tensor) -> Any:
    """What an encoder returned, with another last hidden state: what is on top of it reads that."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


def _mask(num_tokens_B: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=num_tokens_B.device) < num_tokens_B[:, None]


def takes_segments(model: nn.Module) -> bool:
    """Whether a model reads token types."""
    import inspect

    return "token_type_ids" in inspect.signature(model.forward).parameters


def _layer_list_owner(model: nn.Module) -> nn.Module:
    """The module whose list of layers is empty: it hands on what it is given."""
    for module in model.modules():
        if any(isinstance(child, nn.ModuleList) and not len(child) for child in module.children()):
            return module
    raise AssertionError(f"{type(model).__name__} has no list of layers")


def _replaced(output: Any, hidden_B1D: Tensor) -> Any:
    return hidden_B1D if isinstance(output, Tensor) else type(output)(last_hidden_state=hidden_B1D)
