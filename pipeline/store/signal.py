"""Signals: the kinds of teacher output a store can hold, and how each is laid out as an array."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UsageError, near_match

Axis = Literal["example", "token", "pair"]


@dataclass(frozen=True)
class SignalKind:
    """One kind of teacher output.

    Attributes:
        axis: "example" (one entry a row), "token" (one a token) or "pair" (n * n of a row of n tokens, first by the
            token that attends, then by the one attended to).
        dims: names of the trailing dimensions of one entry.
        per_layer: whether it exists once per layer (0 is the embedding output).
        dtype: what it is stored as unless asked otherwise.
        about: one line for people.
        first_layer: the lowest layer it exists at: attention is inside the blocks, which are numbered from 1.
    """

    axis: Axis
    dims: tuple[str, ...]
    per_layer: bool
    dtype: str
    about: str
    first_layer: int = 0


SIGNALS: Mapping[str, SignalKind] = {
    "logits": SignalKind("example", ("label",), False, "float32", "raw scores of the head, before any softmax"),
    "logits.tok": SignalKind(
        "token", ("label",), False, "float32", "raw scores of a token classifier's head at every token"
    ),
    "hidden.cls": SignalKind("example", ("hidden",), True, "float16", "hidden state of the first token"),
    "hidden.mean": SignalKind("example", ("hidden",), True, "float16", "mean hidden state over the row's tokens"),
    "hidden.tok": SignalKind("token", ("hidden",), True, "float16", "hidden state of every token"),
    "attention.qkv": SignalKind(
        "token", ("projection", "hidden"), True, "float16", "query, key and value of every token", first_layer=1
    ),
    "attention.score": SignalKind(
        "pair", ("head",), True, "float16", "query times key / sqrt(head width): no mask, before any softmax",
        first_layer=1,
    ),
    "mlm.hidden": SignalKind(
        "example", ("mask", "hidden"), False, "float16", "last hidden state at the tokens that are masked"
    ),
    "mlm.logits": SignalKind(
        "example", ("mask", "vocabulary"), False, "float16", "raw scores over the vocabulary at the masked tokens"
    ),
}  # fmt: skip
"""What a teacher can be asked for, by name."""

SYNONYMS: Mapping[str, tuple[str, int]] = {"embedding": ("hidden.tok", 0)}
"""Other names that people may ask by: → (signal, layer)."""

INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(
        ("attention.relation", "attention.value", "attention.query", "attention.key"),
        "attention.qkv@LAYER: relations of any number of heads follow from queries, keys and values, which follow from "
        "hidden.tok of the layer below with sidecar attn_in@LAYER",
    ),
    **dict.fromkeys(
        ("attention.probability", "attention.prob"), "attention.score@LAYER: probabilities follow from scores, not back"
    ),
}
"""What is not stored: → what it follows from."""

INPUTS: Mapping[str, SignalKind] = {
    "token_ids": SignalKind("token", (), False, "uint16", "what the teacher reads; always stored"),
    "segment_ids": SignalKind("token", (), False, "uint8", "token types the teacher reads; always stored"),
}
"""What the teacher reads. Written when rows are allocated, so they cannot be asked for."""


@dataclass(frozen=True)
class Encoding:
    """How the numbers of a teacher output are kept; `codec.py` does it.

    Attributes:
        parts: the arrays it takes, name → dtype. "" is the one that stands for the signal; the others have one number
            per entry.
        error: the largest difference from the teacher's number x, for people.
    """

    parts: Mapping[str, str]
    error: str


ENCODINGS: Mapping[str, Encoding] = {
    "float32": Encoding({"": "float32"}, "none"),
    "float16": Encoding({"": "float16"}, "|x|/2048 (3e-8 below 6e-5)"),
    "int8": Encoding({"": "int8", "scale": "float32"}, "largest |x| of the row or token / 253.9"),
}
"""Encodings by name, the most exact first."""

RAW = "raw"
"""The encoding of what the teacher reads: the numbers themselves."""


@dataclass(frozen=True)
class Signal:
    """A signal of one layer, in any encoding or in one: `logits`, `hidden.tok@6`, `hidden.tok@6:int8`."""

    name: str
    layer: int | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        kind = self.kind
        if kind.per_layer != (self.layer is not None):
            wanted = f"{self.name}@LAYER" if kind.per_layer else self.name
            raise UsageError(f"signal {self.name!r} is written {wanted}, got {self}")
        if self.layer is not None and not kind.first_layer <= self.layer <= 999:
            first = "1 (the first block)" if kind.first_layer else "0 (the embedding output)"
            raise UsageError(f"signal {self}: layers are numbered {first} to 999")
        if self.encoding is not None and (self.name in INPUTS or self.encoding not in ENCODINGS):
            raise UsageError(f"signal {self}: unknown encoding {self.encoding!r}{near_match(self.encoding, ENCODINGS)}")

    @property
    def kind(self) -> SignalKind:
        """What it is."""
        kind = SIGNALS.get(self.name) or INPUTS.get(self.name)
        if kind is None:
            raise UsageError(f"unknown signal {self.name!r}{near_match(self.name, SIGNALS)}")
        return kind

    @property
    def bare(self) -> Signal:
        """It in any encoding."""
        return self if self.encoding is None else Signal(self.name, self.layer)

    @classmethod
    def parse(cls, text: str) -> Signal:
        """One signal from its written form (`str(signal)`).

        >>> Signal.parse("hidden.tok@6:int8")
        Signal(name='hidden.tok', layer=6, encoding='int8')
        """
        place, colon, encoding = text.partition(":")
        name, at, layer = place.partition("@")
        if at and not re.fullmatch(r"[0-9]{1,3}", layer):
            raise UsageError(f"signal {text!r}: expected one layer number after @, got {layer!r}")
        return cls(name, int(layer) if at else None, encoding if colon else None)

    def __str__(self) -> str:
        place = self.name if self.layer is None else f"{self.name}@{self.layer}"
        return place if self.encoding is None else f"{place}:{self.encoding}"


def _array_names() -> dict[str, tuple[str, str | None, str]]:
    names: dict[str, tuple[str, str | None, str]] = {name: (name, None, "") for name in INPUTS}
    for name in SIGNALS:
        for encoding, kind in ENCODINGS.items():
            for part in kind.parts:
                suffix = f".{part}" if part else ""
                names[name + suffix] = (name, None, part)
                names[f"{name}.{encoding}{suffix}"] = (name, encoding, part)
    return names


ARRAY_NAMES: Mapping[str, tuple[str, str | None, str]] = _array_names()
"""First component of an array's path → name of the signal, encoding (None: the signal's first) and part."""

TOKEN_IDS = Signal("token_ids")
SEGMENT_IDS = Signal("segment_ids")


def parse_signals(text: str, num_layers: int) -> tuple[Signal, ...]:
    """The signals a list like `logits,hidden.cls@all,hidden.tok@4+6:int8` names, in order, each once.

    Layers: `@6`, `@4+6`, `@1-12`, `@all` (0 to num_layers; attention from 1), `@last`; 0 is the embedding output.
    `:ENCODING` at the end of an item asks for that encoding of all its layers; the same signal may be asked for in
    several. `embedding` is another name of `hidden.tok@0`.

    Args:
        num_layers: of the teacher; the highest layer there is.

    Raises:
        UsageError: unknown name, layer out of range, a layer where none belongs or none where one does.

    >>> [str(s) for s in parse_signals("logits,hidden.cls@all,hidden.tok@0+2", 2)]
    ['logits', 'hidden.cls@0', 'hidden.cls@1', 'hidden.cls@2', 'hidden.tok@0', 'hidden.tok@2']
    """
    signals: dict[Signal, None] = {}
    for item in text.split(","):
        place, colon, encoding = (part.strip() for part in item.partition(":"))
        name, at, layers = (part.strip() for part in place.partition("@"))
        if name in SYNONYMS and not at:
            name, at, layers = SYNONYMS[name][0], "@", str(SYNONYMS[name][1])
        if colon and encoding not in ENCODINGS:
            raise UsageError(f"{item.strip()!r}: unknown encoding {encoding!r}{near_match(encoding, ENCODINGS)}")
        if not name:
            raise UsageError(f"empty signal name in {text!r}", fix="name signals like logits,hidden.tok@4+6")
        if name in INPUTS:
            raise UsageError(f"signal {name!r} is always stored", fix=f"leave {name} out of the list")
        if name in INSTEAD:
            raise UsageError(f"signal {name!r} is not stored", fix=INSTEAD[name])
        if name not in SIGNALS:
            raise UsageError(f"unknown signal {name!r}{near_match(name, SIGNALS)}")
        if not SIGNALS[name].per_layer:
            if at:
                raise UsageError(f"signal {name!r} has no layers, got {item.strip()!r}", fix=f"write {name}")
            signals[Signal(name, None, encoding or None)] = None
            continue
        if not at:
            raise UsageError(f"signal {name!r} needs a layer", fix=f"write {name}@last, {name}@all or {name}@4+6")
        for layer in parse_layers(layers, num_layers, item.strip(), first_layer=SIGNALS[name].first_layer):
            signals[Signal(name, layer, encoding or None)] = None
    return tuple(signals)


def format_signals(signals: Iterable[Signal]) -> str:
    """Signals as a list that `parse_signals` reads, layers that stand side by side together.

    >>> format_signals(parse_signals("logits,hidden.tok@0+2-5:int8", 6))
    'logits,hidden.tok@0+2-5:int8'
    """
    items: list[tuple[str, str | None, list[int]]] = []
    for signal in signals:
        layers = [] if signal.layer is None else [signal.layer]
        if layers and items and items[-1][:2] == (signal.name, signal.encoding):
            items[-1][2].extend(layers)
        else:
            items.append((signal.name, signal.encoding, layers))
    return ",".join(
        name + (f"@{_format_layers(layers)}" if layers else "") + (f":{encoding}" if encoding else "")
        for name, encoding, layers in items
    )


def _format_layers(layers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs)


def parse_layers(text: str, num_layers: int, item: str, *, first_layer: int = 0) -> list[int]:
    """The layers that `6`, `4+6`, `1-12`, `all` or `last` name.

    Args:
        item: what they stand in, for messages.
        first_layer: the lowest there is.

    Raises:
        UsageError: not of that form, or a layer that the teacher does not have.
    """
    if text == "all":
        return list(range(first_layer, num_layers + 1))
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
        if first < first_layer:
            raise UsageError(f"{item!r}: attention is inside the blocks, which are layers 1 to {num_layers}")
        if last > num_layers:
            raise UsageError(f"{item!r}: the teacher has layers 0 to {num_layers}, got {last}")
        layers += range(first, last + 1)
    return layers


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: a signal in one encoding, or a part of it.

    Attributes:
        signal: which, without an encoding.
        shape: of one entry (the trailing dimensions): `(num_labels,)`, `(hidden_size,)`, `()` for ids and scales.
        dtype: "int8", "float16", "float32", "uint8", "uint16" or "uint32"; little endian on disk.
        encoding: one of `ENCODINGS`, or "raw" for what the teacher reads; left out, plain numbers of `dtype`.
        part: of the encoding; "" is the array that stands for the signal.
        plain: whether the signal's encoding is its first in the store, which has the plain path.
    """

    signal: Signal
    shape: tuple[int, ...]
    dtype: str
    encoding: str = ""
    part: str = ""
    plain: bool = True

    def __post_init__(self) -> None:
        assert self.signal.encoding is None, "a spec names its encoding in its own field"
        is_input = self.signal.name in INPUTS
        if not self.encoding:
            object.__setattr__(self, "encoding", RAW if is_input else self.dtype)
            if not is_input and self.encoding not in ENCODINGS:
                raise UsageError(
                    f"signal {self.signal} cannot be stored as {self.dtype!r}{near_match(self.dtype, ENCODINGS)}"
                )
        known = (RAW,) if is_input else tuple(ENCODINGS)
        if self.encoding not in known:
            raise UsageError(f"signal {self.signal}: unknown encoding {self.encoding!r} (known: {', '.join(known)})")
        parts = {"": ("uint8", "uint16", "uint32")} if is_input else self._dtypes
        if self.dtype not in parts.get(self.part, ()):
            raise UsageError(f"signal {self.signal} cannot be stored as {self.dtype!r} by encoding {self.encoding}")
        dims = self.dims[1:]
        if len(self.shape) != len(dims) or not all(1 <= size <= 1 << 24 for size in self.shape):
            raise UsageError(f"signal {self.signal} has entries of shape [{', '.join(dims)}], got {list(self.shape)}")

    @property
    def _dtypes(self) -> dict[str, tuple[str, ...]]:
        return {part: (dtype,) for part, dtype in ENCODINGS[self.encoding].parts.items()}

    @classmethod
    def at(cls, path: str, shape: tuple[int, ...], dtype: str, encoding: str) -> ArraySpec:
        """The spec of the array at `path`.

        Raises:
            ValueError: no array of a store is there.
            UsageError: one is, and it looks otherwise.
        """
        match = re.fullmatch(r"([a-z0-9_.]{1,60})(?:/([0-9]{2,3}))?", path)
        if match is None or match[1] not in ARRAY_NAMES:
            raise ValueError(f"no signal lives at {path!r}")
        name, asked, part = ARRAY_NAMES[match[1]]
        if (SIGNALS.get(name) or INPUTS[name]).per_layer != (match[2] is not None):
            raise ValueError(f"no signal lives at {path!r}")
        signal = Signal(name, None if match[2] is None else int(match[2]))
        spec = cls(signal, shape, dtype, encoding, part, plain=asked is None)
        if spec.path != path:
            raise ValueError(f"no signal lives at {path!r} in encoding {encoding}")
        return spec

    @property
    def axis(self) -> Axis:
        """ "example", "token" or "pair"."""
        return self.signal.kind.axis

    @property
    def path(self) -> str:
        """Of the array inside the store: `logits`, `hidden.tok/06`, `hidden.tok.int8.scale/06`."""
        return self.sibling(self.part)

    def sibling(self, part: str) -> str:
        """Path of another part of the same encoding of the signal."""
        names = [self.signal.name, *([] if self.plain else [self.encoding]), *([part] if part else [])]
        return ".".join(names) + ("" if self.signal.layer is None else f"/{self.signal.layer:02d}")

    @property
    def encoded(self) -> Signal:
        """The signal with this encoding; as it is for what the teacher reads."""
        return self.signal if self.encoding == RAW else replace(self.signal, encoding=self.encoding)

    @property
    def label(self) -> str:
        """The signal for people, with its encoding where that is not the first: `hidden.tok@6`, `hidden.tok@6:int8`."""
        return str(self.signal if self.plain else self.encoded)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of all dimensions, the axis first."""
        return (self.axis, *(() if self.part else self.signal.kind.dims))

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return {"int8": 1, "uint8": 1, "uint16": 2, "float16": 2, "uint32": 4, "float32": 4}[self.dtype]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: of a row, a token or a pair of tokens."""
        return self.itemsize * math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """What records say about it."""
        return {"array": self.path, "dtype": self.dtype, "encoding": self.encoding, "shape": list(self.shape)}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a teacher that entries of its outputs are made of.

    Attributes:
        label: columns of its logits.
        hidden: width of a hidden state.
        head: attention heads; 0 where it does not say.
        mask: slots of a row for masked tokens; 0 where texts are read as they are.
        vocabulary: columns of a masked-LM head's logits; 0 as above.
    """

    label: int
    hidden: int
    head: int = 0
    mask: int = 0
    vocabulary: int = 0
    projection: int = 3
    """Query, key and value."""

    def shape(self, signal: Signal) -> tuple[int, ...]:
        """Of one entry of a signal."""
        return tuple(int(getattr(self, dim)) for dim in signal.kind.dims)

    def of(self, signal: Signal, entries: Mapping[Axis, int]) -> int:
        """Bytes of a signal in its encoding, scales included; exact but for what a store adds to its files.

        Args:
            entries: how many on each axis.
        """
        return sum(spec.entry_bytes * entries[spec.axis] for spec in array_specs(signal, self.shape(signal)))


def array_spec(signal: Signal, shape: int | tuple[int, ...], *, dtype: str | None = None) -> ArraySpec:
    """The spec of a teacher output that is stored as plain numbers.

    Args:
        shape: of one entry (see `Sizes.shape`); a number is the size of its one dimension.
        dtype: "float32" or "float16"; None takes the default of the kind.
    """
    return ArraySpec(signal, shape if isinstance(shape, tuple) else (shape,), dtype or signal.kind.dtype)


def array_specs(signal: Signal, shape: int | tuple[int, ...]) -> tuple[ArraySpec, ...]:
    """The arrays of a teacher output in the encoding that `signal` names, or the default of its kind.

    Args:
        shape: of one entry (see `Sizes.shape`); a number is the size of its one dimension.
    """
    encoding = signal.encoding or signal.kind.dtype
    entry = shape if isinstance(shape, tuple) else (shape,)
    return tuple(
        ArraySpec(signal.bare, () if part else entry, dtype, encoding, part)
        for part, dtype in ENCODINGS[encoding].parts.items()
    )


def place(wanted: Iterable[ArraySpec], there: Iterable[ArraySpec]) -> tuple[ArraySpec, ...]:
    """Specs with the paths they have in a store that holds others: a signal's first encoding has the plain one.

    Args:
        wanted: each once or more. What is not plain stays so: it comes from a store where it stands beside another.
        there: the arrays declared.
    """
    there = tuple(there)
    first = {spec.signal: spec.encoding for spec in there if spec.plain}
    beside = {(spec.signal, spec.encoding) for spec in there if not spec.plain}
    placed = []
    for spec in wanted:
        plain = spec.plain and (spec.signal, spec.encoding) not in beside
        plain = plain and first.setdefault(spec.signal, spec.encoding) == spec.encoding
        placed.append(replace(spec, plain=plain))
    return tuple(dict.fromkeys(placed))
