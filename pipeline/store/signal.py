"""Signals: the kinds of teacher output a store can hold, and how each is laid out as an array."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError, near_match

Axis = Literal["example", "token"]


@dataclass(frozen=True)
class SignalKind:
    """One kind of teacher output.

    Attributes:
        axis: "example" (one entry a row) or "token" (one entry a token).
        dims: names of the trailing dimensions of one entry.
        per_layer: whether it exists once per layer (0 is the embedding output).
        dtype: what it is stored as unless asked otherwise.
        about: one line for people.
    """

    axis: Axis
    dims: tuple[str, ...]
    per_layer: bool
    dtype: str
    about: str


SIGNALS: Mapping[str, SignalKind] = {
    "logits": SignalKind("example", ("label",), False, "float32", "raw scores of the head, before any softmax"),
    "hidden.cls": SignalKind("example", ("hidden",), True, "float16", "hidden state of the first token"),
    "hidden.mean": SignalKind("example", ("hidden",), True, "float16", "mean hidden state over the row's tokens"),
    "hidden.tok": SignalKind("token", ("hidden",), True, "float16", "hidden state of every token"),
}
"""What a teacher can be asked for, by name."""

INPUTS: Mapping[str, SignalKind] = {
    "token_ids": SignalKind("token", (), False, "uint16", "what the teacher reads; always stored"),
    "segment_ids": SignalKind("token", (), False, "uint8", "token types the teacher reads; always stored"),
}
"""What the teacher reads. Written when rows are allocated, so they cannot be asked for."""

FLOAT_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Signal:
    """A signal of one layer: `logits`, `hidden.tok@6`."""

    name: str
    layer: int | None = None

    def __post_init__(self) -> None:
        kind = self.kind
        if kind.per_layer != (self.layer is not None):
            wanted = f"{self.name}@LAYER" if kind.per_layer else self.name
            raise UsageError(f"signal {self.name!r} is written {wanted}, got {self}")
        if self.layer is not None and not 0 <= self.layer <= 999:
            raise UsageError(f"signal {self}: layers are numbered 0 (the embedding output) to 999")

    @property
    def kind(self) -> SignalKind:
        """What it is."""
        kind = SIGNALS.get(self.name) or INPUTS.get(self.name)
        if kind is None:
            raise UsageError(f"unknown signal {self.name!r}{near_match(self.name, SIGNALS)}")
        return kind

    @property
    def path(self) -> str:
        """Where its array is inside the store: `logits`, `hidden.tok/06`."""
        return self.name if self.layer is None else f"{self.name}/{self.layer:02d}"

    @classmethod
    def parse(cls, text: str) -> Signal:
        """One signal from its written form (`str(signal)`).

        >>> Signal.parse("hidden.tok@6")
        Signal(name='hidden.tok', layer=6)
        """
        name, at, layer = text.partition("@")
        if at and not re.fullmatch(r"[0-9]{1,3}", layer):
            raise UsageError(f"signal {text!r}: expected one layer number after @, got {layer!r}")
        return cls(name, int(layer) if at else None)

    @classmethod
    def from_path(cls, path: str) -> Signal:
        """The signal whose array is at `path`; ValueError for any other path."""
        match = re.fullmatch(r"([a-z_.]{1,40})(?:/([0-9]{2,3}))?", path)
        try:
            if match:
                signal = cls(match[1], None if match[2] is None else int(match[2]))
                if signal.path == path:
                    return signal
        except UsageError:
            pass
        raise ValueError(f"no signal lives at {path!r}")

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}@{self.layer}"


TOKEN_IDS = Signal("token_ids")
SEGMENT_IDS = Signal("segment_ids")


def parse_signals(text: str, num_layers: int) -> tuple[Signal, ...]:
    """The signals a list like `logits,hidden.cls@all,hidden.tok@4+6` names, in order, each once.

    Layers: `@6`, `@4+6`, `@1-12`, `@all` (0 to num_layers), `@last`; 0 is the embedding output.

    Args:
        num_layers: of the teacher; the highest layer there is.

    Raises:
        UsageError: unknown name, layer out of range, a layer where none belongs or none where one does.

    >>> [str(s) for s in parse_signals("logits,hidden.cls@all,hidden.tok@0+2", 2)]
    ['logits', 'hidden.cls@0', 'hidden.cls@1', 'hidden.cls@2', 'hidden.tok@0', 'hidden.tok@2']
    """
    signals: dict[Signal, None] = {}
    for item in text.split(","):
        name, at, layers = (part.strip() for part in item.partition("@"))
        if not name:
            raise UsageError(f"empty signal name in {text!r}", fix="name signals like logits,hidden.tok@4+6")
        if name in INPUTS:
            raise UsageError(f"signal {name!r} is always stored", fix=f"leave {name} out of the list")
        if name not in SIGNALS:
            raise UsageError(f"unknown signal {name!r}{near_match(name, SIGNALS)}")
        if not SIGNALS[name].per_layer:
            if at:
                raise UsageError(f"signal {name!r} has no layers, got {item.strip()!r}", fix=f"write {name}")
            signals[Signal(name)] = None
            continue
        if not at:
            raise UsageError(f"signal {name!r} needs a layer", fix=f"write {name}@last, {name}@all or {name}@4+6")
        for layer in _parse_layers(layers, num_layers, item.strip()):
            signals[Signal(name, layer)] = None
    return tuple(signals)


def _parse_layers(text: str, num_layers: int, item: str) -> list[int]:
    if text == "all":
        return list(range(num_layers + 1))
    if text == "last":
        return [num_layers]
    layers: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", part.strip())
        if match is None:
            raise UsageError(f"{item!r}: cannot read layers {part!r}", fix="write @6, @4+6, @1-12, @all or @last")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"{item!r}: layers {part!r} run backwards", fix=f"write @{last}-{first}")
        if last > num_layers:
            raise UsageError(f"{item!r}: the teacher has layers 0 to {num_layers}, got {last}")
        layers += range(first, last + 1)
    return layers


@dataclass(frozen=True)
class ArraySpec:
    """How one signal is stored.

    Attributes:
        signal: which.
        shape: of one entry (the trailing dimensions): `(num_labels,)`, `(hidden_size,)`, `()` for ids.
        dtype: "float16", "float32", "uint8", "uint16" or "uint32"; little endian on disk.
        encoding: how values become the stored dtype; "raw" is a plain cast.
    """

    signal: Signal
    shape: tuple[int, ...]
    dtype: str
    encoding: str = "raw"

    def __post_init__(self) -> None:
        dtypes = FLOAT_DTYPES if self.signal.name in SIGNALS else ("uint8", "uint16", "uint32")
        if self.dtype not in dtypes:
            raise UsageError(f"signal {self.signal} cannot be stored as {self.dtype!r}{near_match(self.dtype, dtypes)}")
        if len(self.shape) != len(self.signal.kind.dims) or not all(1 <= size <= 1 << 24 for size in self.shape):
            dims = ", ".join(self.signal.kind.dims)
            raise UsageError(f"signal {self.signal} has entries of shape [{dims}], got {list(self.shape)}")
        if self.encoding != "raw":
            raise UsageError(f"signal {self.signal}: unknown encoding {self.encoding!r} (known: raw)")

    @property
    def axis(self) -> Axis:
        """ "example" or "token"."""
        return self.signal.kind.axis

    @property
    def path(self) -> str:
        """Of the array inside the store."""
        return self.signal.path

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of all dimensions, the axis first."""
        return (self.axis, *self.signal.kind.dims)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return {"uint8": 1, "uint16": 2, "float16": 2, "uint32": 4, "float32": 4}[self.dtype]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: of a row on the example axis, of a token on the token axis."""
        return self.itemsize * math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """What records and array attributes say about it."""
        return {"array": self.path, "dtype": self.dtype, "encoding": self.encoding, "shape": list(self.shape)}


def derivable(specs: Iterable[ArraySpec]) -> list[dict[str, Any]]:
    """What follows from stored arrays without being stored: the sentence signals of a layer whose tokens are.

    Returns:
        Per signal: its name, what it follows from, and whether it would be the same number for number.
    """
    stored = {(spec.signal.name, spec.signal.layer) for spec in specs}
    found = []
    for name, layer in sorted(stored, key=str):
        if name == "hidden.tok":
            for wanted, exact in (("hidden.cls", True), ("hidden.mean", False)):
                if (wanted, layer) not in stored:
                    found.append({"signal": f"{wanted}@{layer}", "from": f"{name}@{layer}", "exact": exact})
    return found


def array_spec(signal: Signal, size: int, *, dtype: str | None = None) -> ArraySpec:
    """The spec of a teacher output.

    Args:
        size: of its one trailing dimension: number of labels or hidden size.
        dtype: "float32" or "float16"; None takes the default of the kind.
    """
    return ArraySpec(signal, (size,), dtype or signal.kind.dtype)
