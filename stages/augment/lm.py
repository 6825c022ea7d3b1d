"""Operator `lm`: a language model goes on from the first words of a text.

"Natural Language Generation for Effective Knowledge Distillation" (Tang et al., 2019) samples transfer sets so. A local
model, any that `AutoModelForCausalLM` opens, best one that was trained on text of the task. A variant keeps the first 1
to n - 1 of the n words of its original, how many is drawn, and the rest is sampled. It ends where the model ends it, at
a line break, or at twice the length of the original. A pair is one string with a separator between its texts, and is
split there again; what has no separator then is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from .generate import Plan
from .generated import Generation, Written
from .generator import MOST_NEW_TOKENS, Generator, load_generator
from .words import word_ends

LEAST_TOKENS = 16
"""A short text may grow to so many tokens."""


@dataclass
class _Start:
    """The first words of a text, and what became of them.

    Attributes:
        row, iteration: of the variant.
        prefix: the words that are kept.
        prompt: their tokens.
        most_new: tokens that may be added.
        text: with what the model added.
        fault: why nothing was.
    """

    row: int
    iteration: int
    prefix: str
    prompt: list[int]
    most_new: int
    text: str = ""
    fault: str | None = None


def continuations(generation: Generation, plan: Plan, originals: pa.Table) -> tuple[list[Written], str]:
    """The variants of some originals, in the order of these, and what they were computed on."""
    ((folder, digest),) = generation.models
    model = load_generator(folder, "causal", digest)
    ids = originals["example_id"].to_pylist()
    rows = [*zip(*(originals[f"text_{letter}"].to_pylist() for letter in plan.letters()), strict=True)]
    starts = _starts(generation, plan.seed, ids, rows, model)
    going = [start for start in starts if start.fault is None]
    found = model.write(
        [start.prompt for start in going],
        [start.most_new for start in going],
        draws=[generation.draws(plan.seed, "text", ids[s.row], s.iteration, s.most_new) for s in going],
        temperature=generation.temperature,
        top_k=generation.top_k,
    )
    for start, (token_ids, _) in zip(going, found, strict=True):
        added = _added(model, start.prompt, token_ids)
        start.text = start.prefix + added
        start.fault = None if added.strip() else "empty"
    return [_variant(start, plan.is_pair, generation.separator) for start in starts], model.computed_on


def _starts(
    generation: Generation, seed: int, ids: Sequence[bytes], rows: Sequence[tuple[str, ...]], model: Generator
) -> list[_Start]:
    """Where the model goes on from, for every variant."""
    wholes = [generation.separator.join(texts) for texts in rows]
    lengths = [len(token_ids) for token_ids in model.encode(wholes)]
    starts = []
    for row, texts in enumerate(rows):
        # The separator is no word of either text: a prefix holds it whole, once there is a word after it.
        ends = [end + len(whole) for whole, text in _before(texts, generation.separator) for end in word_ends(text)]
        for iteration in range(generation.num_variants):
            draw = generation.draws(seed, "prefix", ids[row], iteration, 1)[0]
            prefix = wholes[row][: ends[int(draw * max(1, len(ends) - 1))]] if ends else ""
            starts.append(_Start(row, iteration, prefix, [], 0))
    for start, prompt in zip(starts, model.encode([start.prefix for start in starts]), strict=True):
        most = min(model.room, max(LEAST_TOKENS, 2 * lengths[start.row]))
        start.prompt, start.most_new = prompt, min(most - len(prompt), MOST_NEW_TOKENS)
        start.fault = "empty" if not prompt else "too_long" if start.most_new < 1 else None
    return starts


def _before(texts: Sequence[str], separator: str) -> list[tuple[str, str]]:
    """Every text with what stands before it."""
    return [("".join(text + separator for text in texts[:number]), text) for number, text in enumerate(texts)]


def _added(model: Generator, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of new tokens after those of a prompt, up to the end of the line."""
    # Decoded together: whether a space stands between two pieces, both decide.
    before, whole = model.decode(prompt), model.decode([*prompt, *token_ids])
    added = whole[len(before) :] if whole.startswith(before) else f" {model.decode(token_ids)}"
    return added.partition("\n")[0]


def _variant(start: _Start, is_pair: bool, separator: str) -> Written:
    """What became of a start."""
    side = "both" if is_pair else None
    if start.fault is not None:
        return Written(start.row, start.iteration, side, fault=start.fault)
    mark = separator.strip()
    parts = start.text.split(mark)[:2] if is_pair else [start.text]
    texts = tuple(" ".join(part.split()) for part in parts)
    if is_pair and len(texts) < 2:
        return Written(start.row, start.iteration, side, fault="no_separator")
    if not all(texts):
        return Written(start.row, start.iteration, side, fault="empty")
    return Written(start.row, start.iteration, side, texts, (start.prefix, *[None] * (len(texts) - 1)))
