"""The lattice: which teacher outputs follow from which others, and what of the teacher that takes.

    token_ids --(embeddings)--> hidden.tok@0
    hidden.tok@l-1 --(attn_in@l)--> attention.qkv@l --[attention]--> attention.score@l
    hidden.tok@l --> hidden.cls@l, hidden.mean@l        hidden.cls@L --(head)--> logits        L: the last layer
                                                        hidden.tok@L --(head)--> logits.tok    of a token classifier
    hidden.tok@L --> mlm.hidden --(head)--> mlm.logits        where the store's identity says how rows are masked

In parentheses the sidecar. A sidecar of weights says nothing of how they are used, so `embeddings` and `head` count
only beside a proof: a sidecar without weights that a capture leaves once it has seen the teacher itself give the same.
So do scores, which are more than query times key where positions are relative or rotary. A capture puts `attn_in@l`
there only when it has seen as much. Computing is up to `stages/derivation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from .signal import SEGMENT_IDS, TOKEN_IDS, ArraySpec, Signal


@dataclass(frozen=True)
class Route:
    """A way to a signal.

    Attributes:
        sources: what it follows from.
        sidecar: of weights that it takes; None where the sources suffice.
        proof: the sidecar that proves that it leads there; None where that is so by definition, or by `sidecar`.
        exact: whether it comes out number for number as the teacher would give it, were the sources exact.
    """

    sources: tuple[Signal, ...]
    sidecar: str | None = None
    proof: str | None = None
    exact: bool = False

    def is_open(self, sidecars: Collection[str]) -> bool:
        """Whether a store with these sidecars has what it takes beside the sources."""
        return all(name is None or name in sidecars for name in (self.sidecar, self.proof))


def route_to(signal: Signal, num_layers: int) -> Route | None:
    """The way to a signal of a teacher with `num_layers` layers; None where it has to be stored."""
    name, layer = signal.name, signal.layer
    if name == "logits":
        return Route((Signal("hidden.cls", num_layers),), "head", "head.proof")
    if name == "logits.tok":
        return Route((Signal("hidden.tok", num_layers),), "head", "tokens.proof")
    if name == "mlm.logits":
        return Route((Signal("mlm.hidden"),), "head", "mlm.proof")
    if name == "mlm.hidden":
        return Route((Signal("hidden.tok", num_layers),), exact=True)
    if layer is None:
        return None
    if name in ("hidden.cls", "hidden.mean"):
        return Route((Signal("hidden.tok", layer),), exact=name == "hidden.cls")
    if name == "hidden.tok" and layer == 0:
        return Route((TOKEN_IDS, SEGMENT_IDS), "embeddings", "embeddings.proof")
    if name == "attention.qkv":
        return Route((Signal("hidden.tok", layer - 1),), f"attn_in@{layer}")
    if name == "attention.score":
        return Route((Signal("attention.qkv", layer),), None, "attention.proof")
    return None


def sources_of(
    signal: Signal, held: Callable[[Signal], bool], sidecars: Collection[str], num_layers: int
) -> tuple[Signal, ...] | None:
    """The stored signals that a signal is read or derived from; None where neither is possible.

    Args:
        held: whether a signal is stored.
        sidecars: names of those there.
    """
    if signal in (TOKEN_IDS, SEGMENT_IDS) or held(signal):
        return (signal,)
    route = route_to(signal, num_layers)
    if signal.encoding is not None or route is None or not route.is_open(sidecars):
        return None
    found: dict[Signal, None] = {}
    for source in route.sources:
        its = sources_of(source, held, sidecars, num_layers)
        if its is None:
            return None
        found |= dict.fromkeys(its)
    return tuple(found)


def derivable(
    specs: Iterable[ArraySpec], sidecars: Collection[str] = (), num_layers: int = 0, *, masked: bool = False
) -> list[dict[str, Any]]:
    """What follows from stored arrays and sidecars without being stored.

    Args:
        num_layers: of the teacher; 0 where that is not known.
        masked: whether the store's rows are masked, so that it has masked tokens.

    Returns:
        Per signal: its name, what it follows from, by which sidecar, and whether it would be the same number for
        number.
    """
    stored = {spec.signal for spec in specs}
    layers = sorted({s.layer for s in stored if s.layer is not None} | set(range(num_layers + 1)))
    wanted = [Signal("logits"), Signal("logits.tok")] if num_layers else []
    wanted += [Signal("mlm.hidden"), Signal("mlm.logits")] if num_layers and masked else []
    wanted += [
        Signal(name, layer)
        for name in ("hidden.tok", "hidden.cls", "hidden.mean", "attention.qkv", "attention.score")
        for layer in layers
        if layer >= Signal(name, max(layer, 1)).kind.first_layer
    ]
    found = []
    for signal in wanted:
        sources = None if signal in stored else sources_of(signal, stored.__contains__, sidecars, num_layers)
        if sources is None:
            continue
        taken = _sidecars_to(signal, stored.__contains__, num_layers)
        route = route_to(signal, num_layers)
        assert route is not None
        found.append(
            {
                "signal": str(signal),
                "from": " and ".join(map(str, sources)),
                **({"sidecars": taken} if taken else {}),
                "exact": route.exact and not taken,
            }
        )
    return found


def _sidecars_to(signal: Signal, held: Callable[[Signal], bool], num_layers: int) -> list[str]:
    if held(signal) or (route := route_to(signal, num_layers)) is None:
        return []
    below = [name for source in route.sources for name in _sidecars_to(source, held, num_layers)]
    return [*dict.fromkeys([*([route.sidecar] if route.sidecar else []), *below])]


def signal_of(sidecar: str, head: str) -> Signal | None:
    """What a sidecar of weights of a teacher with that head lets derive; None for one that nothing follows from."""
    group, _, layer = sidecar.partition("@")
    if group == "attn_in":
        return Signal("attention.qkv", int(layer))
    if sidecar == "embeddings":
        return Signal("hidden.tok", 0)
    if sidecar != "head" or head == "none":
        return None
    scores = {"sequence-classification": "logits", "token-classification": "logits.tok", "masked-lm": "mlm.logits"}
    return Signal(scores[head])
