"""What to capture for methods: the smallest set of signals, in bytes, from which all that they need follows exactly.

Per layer l the question is the same: the hidden states of all tokens give the sentence vectors of l, and with the maps
of block l + 1 (`attn_in`) its queries, keys, values and scores. They take 2 n D bytes of a row of n tokens in float16,
scores 2 H n^2, queries, keys and values 6 n D: which is less follows from the corpus' own lengths and the teacher's
widths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...pipeline.errors import RefusedError, UsageError
from ...pipeline.store.lattice import signal_of, sources_of
from ...pipeline.store.signal import Axis, Signal, Sizes

if TYPE_CHECKING:
    from ...pipeline.store.plan import ShardSize
    from ..train_student.methods import Shapes, Term
    from .teacher import Teacher

PROFILES: Mapping[str, str] = {
    "logits": "logits",
    "sentence": "logits and sentence vectors of all blocks",
    "relation": "sentence, and queries, keys and values of the last block",
    "lastlayers": "relation, and the last block's token states with the head",
    "tiny4": "sentence, and what TinyBERT needs for a student of four layers",
    "full": "all token states and sidecars: every method, layer map and number of relation heads",
}
"""Sets of signals by name, each smallest for its own purpose."""

Entries = Mapping[Axis, int]
STATES = ("hidden.", "mlm.hidden")
"""Beginnings of the names of signals that are hidden states."""


@dataclass(frozen=True)
class Choice:
    """What to store.

    Attributes:
        signals: stored, in order.
        sidecars: kept beside them, for what is derived.
        bytes_of: of each signal, over the rows that lack it, and of each sidecar; 0 for what is stored already.
    """

    signals: tuple[Signal, ...]
    sidecars: tuple[str, ...]
    bytes_of: Mapping[str, int]


def entries_of(shards: Iterable[ShardSize]) -> Entries:
    """How many entries shards of these sizes have on each axis; of pairs more than anything, where there is no room."""
    rows, tokens, pairs = (sum(axis) for axis in zip(*shards, strict=True))
    return {"example": rows, "token": tokens, "pair": pairs or 1 << 60}


def smallest(
    needed: Collection[Signal],
    entries: Entries,
    sizes: Sizes,
    num_layers: int,
    *,
    holds: Callable[[str], bool],
    sidecar_bytes: Callable[[str], int],
    kept: Collection[str] = (),
    hidden_dtype: str | None = None,
    stored: Mapping[Signal, Entries] | None = None,
) -> Choice:
    """The cheapest choice that gives all that is needed; of equal ones, that which makes more possible.

    Args:
        needed: signals wanted, each as it would be stored.
        entries: of the rows of the corpus.
        stored: how many of them the store holds of a signal already: those cost nothing.
        holds: whether a way of the lattice leads where it should, by its sidecar.
        sidecar_bytes: what a sidecar takes.
        kept: sidecars that are kept whatever is chosen here.
        hidden_dtype: how hidden states will be stored; None is their default.
    """
    signals: dict[Signal, None] = {}
    sidecars: dict[str, None] = {}

    def cost(items: Iterable[Signal]) -> int:
        return sum(sizes.of(_stored_as(item, hidden_dtype), lacking(item)) for item in items)

    def lacking(item: Signal) -> Entries:
        there = (stored or {}).get(item)
        return entries if there is None else {axis: max(0, count - there[axis]) for axis, count in entries.items()}

    # 4 bytes a label: nothing that gives them is smaller.
    signals |= dict.fromkeys(signal for signal in (Signal("logits"), Signal("logits.tok")) if signal in needed)
    for layer in range(num_layers + 1):
        tokens = Signal("hidden.tok", layer)
        sentence = [s for s in needed if s.layer == layer and s.name in ("hidden.cls", "hidden.mean")]
        above = [s for s in needed if s.layer == layer + 1 and s.name.startswith("attention.")]
        # Queries and keys give the scores; of long texts they are fewer numbers.
        qkv, maps = Signal("attention.qkv", layer + 1), f"attn_in@{layer + 1}"
        if above and (qkv in above or cost([qkv]) < cost(above)):
            above = [qkv]
        cost_of_tokens, by_table = cost([tokens]), False
        if layer == 0 and holds("embeddings"):
            cost_of_table = 0 if "embeddings" in kept else sidecar_bytes("embeddings")
            by_table = cost_of_table <= cost_of_tokens
            cost_of_tokens = min(cost_of_table, cost_of_tokens)
        may_derive = bool(above) and holds(maps)
        cost_of_maps = sidecar_bytes(maps) if may_derive and maps not in kept else 0
        through_maps = may_derive and cost_of_maps <= cost(above)
        with_tokens = cost_of_tokens + (cost_of_maps if through_maps else cost(above))
        if tokens in needed or ((sentence or above) and with_tokens <= cost(sentence) + cost(above)):
            if by_table:
                sidecars["embeddings"] = None
            else:
                signals[tokens] = None
            if through_maps:
                sidecars[maps] = None
                continue
        else:
            signals |= dict.fromkeys(sentence)
        signals |= dict.fromkeys(above)
    masked, scored, last = Signal("mlm.hidden"), Signal("mlm.logits"), Signal("hidden.tok", num_layers)
    if masked in needed or scored in needed:
        states = min((masked, last), key=lambda signal: 0 if signal in signals else cost([signal]))
        cost_of_states = 0 if states in signals or masked in needed else cost([states])
        through_head = scored in needed and holds("head")
        if through_head:
            cost_of_head = 0 if "head" in kept else sidecar_bytes("head")
            through_head = cost_of_states + cost_of_head <= cost([scored])
        if through_head:
            sidecars["head"] = None
        elif scored in needed:
            signals[scored] = None
        if through_head or masked in needed:
            signals[states] = None
    bytes_of = {str(signal): cost([signal]) for signal in signals}
    bytes_of |= {f"sidecar {name}": sidecar_bytes(name) for name in sidecars}
    return Choice(tuple(signals), tuple(sidecars), bytes_of)


def _stored_as(signal: Signal, hidden_dtype: str | None) -> Signal:
    return replace(signal, encoding=hidden_dtype) if signal.name.startswith(STATES) else signal


def possible_methods(
    signals: Collection[Signal], sidecars: Collection[str], shapes: Shapes, *, besides: Collection[str]
) -> tuple[str, ...]:
    """Methods, options at their defaults, whose signals are all stored or follow.

    Args:
        signals: stored.
        sidecars: kept, proofs included.
        besides: methods to leave out.
    """
    from ..train_student.methods import methods

    held = {signal.bare for signal in signals}
    found = []
    for name in methods:
        try:
            method = methods.make(name, {})
            needed = method.signals(shapes)
        except UsageError:
            continue
        ways = [sources_of(signal, held.__contains__, sidecars, shapes.teacher_layers) for signal in needed]
        if method.takes_scores() and "attention.proof" not in sidecars:
            continue
        if needed and name not in besides and all(ways):
            found.append(name)
    return tuple(found)


# --- what methods and profiles need ------------------------------------------------------------------------------


def shapes_for(teacher: Teacher, student_layers: int | None) -> Shapes:
    """The teacher beside a student like it, of fewer layers: half as many unless said otherwise."""
    from ..train_student.methods import Shapes

    layers = student_layers or max(1, teacher.num_layers // 2)
    widths = (teacher.hidden_size,) * (layers + 1)
    return Shapes(
        task="masked-lm" if teacher.masking is not None else teacher.task or "single-label",
        num_labels=max(1, teacher.num_labels),
        token_widths=widths,
        sentence_widths=widths,
        teacher_layers=teacher.num_layers,
        teacher_width=teacher.hidden_size,
        student_heads=teacher.num_heads,
        attention_width=teacher.hidden_size,
        teacher_heads=teacher.num_heads,
    )


def needs_of(terms: Iterable[Term], shapes: Shapes) -> tuple[Signal, ...]:
    """Signals that methods need, each once."""
    return tuple(dict.fromkeys(signal for term in terms for signal in term.method.signals(shapes)))


def profile_needs(name: str, teacher: Teacher) -> tuple[tuple[Signal, ...], tuple[str, ...]]:
    """(signals, sidecars) that a profile promises."""
    last = teacher.num_layers
    given = signal_of("head", teacher.head)
    logits = [] if given is None else [given]
    sentence = [Signal(f"hidden.{kind}", layer) for kind in ("cls", "mean") for layer in range(1, last + 1)]
    relation = [*logits, *sentence, Signal("attention.qkv", last)]
    if name == "logits":
        return tuple(logits), ()
    if name == "sentence":
        return (*logits, *sentence), ()
    if name == "relation":
        return tuple(relation), ()
    if name == "lastlayers":
        return (*relation, Signal("hidden.tok", last)), ("head",)
    if name == "tiny4":
        if last < 4:
            raise UsageError(f"--profile tiny4 is for teachers of 4 layers and more, not {last}", fix="--for tinybert")
        blocks = [max(1, int(m * last / 4 + 0.5)) for m in range(1, 5)]
        tiny = [Signal(kind, layer) for layer in blocks for kind in ("hidden.tok", "attention.score")]
        return (*logits, *sentence, Signal("hidden.tok", 0), *tiny), ()
    tokens = [Signal("hidden.tok", layer) for layer in range(last + 1)]
    attention = [Signal("attention.qkv", layer) for layer in range(1, last + 1)]
    return (*logits, *tokens, *attention), ("layers", "head")


WITHOUT_SCORES = (
    "minilmv2, which compares queries, keys and values with themselves, or methods on hidden states (fitnets)"
)
"""What fits a teacher whose scores are not query times key."""


def require_true_scores_for(needed: Iterable[Signal], terms: Iterable[Term], scores: str | None) -> None:
    """RefusedError when scores are needed and, for the reason given, are not what queries and keys give.

    Args:
        needed: signals.
        terms: methods; some take queries and keys for scores.
    """
    wanted = [str(signal) for signal in needed if signal.name == "attention.score"]
    wanted += [f"method {term.method.name!r}" for term in terms if term.method.takes_scores()]
    if wanted and scores is not None:
        raise RefusedError(
            f"attention scores are needed ({', '.join(wanted)}), and kd has no way to this teacher's",
            details=[scores],
            fix=WITHOUT_SCORES,
        )
