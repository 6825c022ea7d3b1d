"""Whether what the lattice says holds for this very teacher: derived signals against the teacher's own, on a few rows.

A layer that normalises before its attention, rotary or relative positions, a head that reads more than the first token:
each makes a way of the lattice lead elsewhere. It is then not taken, and the signal is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged
from ...pipeline.store.keys import row_keys
from ...pipeline.store.lattice import Route, route_to, signal_of
from ...pipeline.store.signal import SEGMENT_IDS, TOKEN_IDS, Signal

if TYPE_CHECKING:
    from torch import nn

    from ..derivation import Derivation
    from .teacher import Teacher

ROWS, TOKENS = 8, 2048
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}
"""Largest difference, as a share of the largest magnitude of the signal, by the dtype that the teacher computes in."""


@dataclass(frozen=True)
class Shortcut:
    """What was found of one way of the lattice.

    Attributes:
        sidecar: that it takes.
        signal: that it leads to.
        holds: whether that is what the teacher gives.
        why: what was found, for people.
        error: the largest difference; None where nothing could be compared.
    """

    sidecar: str
    signal: Signal
    holds: bool
    why: str
    error: float | None = None

    def __str__(self) -> str:
        verb = "follows" if self.holds else "does not follow"
        return f"{self.signal} {verb} from sidecar {self.sidecar}: {self.why}"


def try_shortcuts(
    teacher: Teacher, sidecars: Iterable[str], token_ids: Ragged, segment_ids: Ragged, *, dtype: str, device: str
) -> dict[str, Shortcut]:
    """What holds, by sidecar; those that nothing follows from are left out.

    Args:
        token_ids, segment_ids: rows to try on; a few of all lengths are taken.
        dtype: that the teacher computes in.
        device: where it runs.
    """
    from ..derivation import Derivation
    from .sidecars import tensors_of

    wanted = {name: signal for name in sidecars if (signal := signal_of(name, teacher.head)) is not None}
    if not wanted:
        return {}
    model = teacher.load("auto")  # kept: the same model where it computes in the checkpoint's dtype
    found = {name: shortcut for name, signal in wanted.items() if (shortcut := _without_maps(model, name, signal))}
    tried = {name: signal for name, signal in wanted.items() if name not in found}
    routes = {name: _route(signal, teacher) for name, signal in tried.items()}
    rows = _some_rows(token_ids.lengths)
    inputs = {TOKEN_IDS: token_ids.take(rows), SEGMENT_IDS: segment_ids.take(rows)}
    asked = {s for name, signal in tried.items() for s in (signal, *routes[name].sources) if s not in inputs}
    said = _teacher_says(teacher, asked, inputs, dtype=dtype, device=device)
    as_read, positions_BM = _as_read(teacher, inputs)
    derivation = Derivation(teacher.config, teacher.head, lambda name: dict(tensors_of(model, name)))
    for name, signal in tried.items():
        found[name] = _compare(derivation, name, signal, routes[name], as_read, positions_BM, said, TOLERANCE[dtype])
    return found


def _as_read(teacher: Teacher, inputs: Mapping[Signal, Ragged]) -> tuple[Mapping[Signal, Ragged], np.ndarray | None]:
    """Token and segment ids as the teacher reads them, and where they are masked [B, M]."""
    if teacher.masking is None:
        return inputs, None
    ids, segments = inputs[TOKEN_IDS], inputs[SEGMENT_IDS]
    masked = teacher.masking.apply(ids.to_padded(), ids.lengths, row_keys(ids, segments))
    return {**inputs, TOKEN_IDS: Ragged.from_padded(masked.ids_BT, ids.lengths)}, masked.positions_BM


def _route(signal: Signal, teacher: Teacher) -> Route:
    route = route_to(signal, teacher.num_layers)
    assert route is not None
    return route


def try_scores(teacher: Teacher, layers: Iterable[int], *, dtype: str, device: str) -> Shortcut:
    """Whether scores are query times key / sqrt(head width), as the attention that the teacher reports has it."""
    import torch

    from .attention import require_true_scores

    layers = sorted(layers)
    signal = Signal("attention.score", layers[0])
    model = teacher.load(dtype).to(device)
    try:
        require_true_scores(model, layers, torch.device(device))
    except RefusedError as error:
        return Shortcut("attention", signal, False, "; ".join([error.what, *map(str, error.details)]))
    return Shortcut("attention", signal, True, "its softmax is the attention that the teacher reports")


def _some_rows(lengths: np.ndarray) -> np.ndarray:
    """Rows of all lengths, the longest among them, few enough for one small batch."""
    order = np.argsort(lengths, kind="stable")
    rows = np.unique(order[np.linspace(0, len(order) - 1, min(ROWS, len(order))).astype(np.int64)])
    most = max(1, TOKENS // max(1, int(lengths[rows].max())))
    return rows[np.argsort(-lengths[rows], kind="stable")][:most]


def _without_maps(model: nn.Module, sidecar: str, signal: Signal) -> Shortcut | None:
    from .attention import attention_maps

    try:
        if signal.name == "attention.qkv":
            assert signal.layer is not None
            attention_maps(model, signal.layer)
    except RefusedError as error:
        return Shortcut(sidecar, signal, False, error.what)
    return None


def _teacher_says(
    teacher: Teacher, asked: Iterable[Signal], inputs: Mapping[Signal, Ragged], *, dtype: str, device: str
) -> Mapping[Signal, np.ndarray]:
    """Entries of signals without padding, float32."""
    from .capture import LoadedTeacher

    ids, segments = inputs[TOKEN_IDS], inputs[SEGMENT_IDS]
    runner = LoadedTeacher(teacher, teacher.load(dtype), device).runner(dict.fromkeys(asked, "float32"))
    try:
        (said,) = runner.run(ids, segments, [np.arange(len(ids))])
    finally:
        runner.close()
    return said.values


def _compare(
    derivation: Derivation,
    sidecar: str,
    signal: Signal,
    route: Route,
    inputs: Mapping[Signal, Ragged],
    positions_BM: np.ndarray | None,
    said: Mapping[Signal, np.ndarray],
    tolerance: float,
) -> Shortcut:
    import torch

    from ..derivation import NUM_TOKENS, POSITIONS

    lengths = inputs[TOKEN_IDS].lengths
    batch = {NUM_TOKENS: torch.from_numpy(lengths)}
    if positions_BM is not None:
        batch[POSITIONS] = torch.from_numpy(positions_BM)
    for source in route.sources:
        values = said.get(source)
        if source.kind.axis == "token":
            values = (inputs[source] if values is None else Ragged.from_lengths(values, lengths)).to_padded()
        assert values is not None
        batch[str(source)] = torch.from_numpy(values)
    try:
        found = derivation.of(batch)[str(signal)].numpy()
    except Exception as error:  # whatever a foreign architecture raises without its layers
        first_line = (str(error).strip().splitlines() or [""])[0][:120]
        return Shortcut(sidecar, signal, False, f"it cannot be computed ({type(error).__name__}: {first_line})")
    wanted = said[signal]
    if signal.kind.axis == "token":
        found = found[np.arange(found.shape[1]) < lengths[:, None]]
    if signal.name == "mlm.logits":
        assert positions_BM is not None
        wanted = wanted[positions_BM >= 0]
    difference, largest = (float(np.abs(numbers).max(initial=0.0)) for numbers in (found - wanted, wanted))
    why = f"largest difference {difference:.2g}, largest number {largest:.2g}"
    if signal.name == "mlm.logits":
        # As they will be: their states are stored in float16.
        (source,) = route.sources
        rounded = derivation.of({**batch, str(source): batch[str(source)].half()})[str(signal)].numpy()
        why += f"; from states in float16 {float(np.abs(rounded - wanted).max(initial=0.0)):.2g}"
    return Shortcut(sidecar, signal, difference <= tolerance * largest, why, difference)
