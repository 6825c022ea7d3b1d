"""Operator `back-translate`: a text goes into another language and comes back (Xie et al., 2020).

Two local translation models, any that `AutoModelForSeq2SeqLM` opens. The first variant of a text is what beam search
finds, there and back; further ones are sampled both ways. A variant of a pair changes the text that `--pair-sides`
says; the first time round by beam search.

A translation is left out that is empty, found no end, is less than half or more than twice as long as the original in
characters, or is mostly in another script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .generate import Plan
from .generated import Generation, Written
from .generator import MOST_NEW_TOKENS, Generator, load_generator
from .pairs import SIDES, sides
from .scripts import main_script

LEAST_RATIO, MOST_RATIO = 0.5, 2.0
_ROUNDS = {"cycle": 3, "alternate": 2, "random": 1}
"""Variants of a pair until each side had its turn."""


@dataclass
class _Journey:
    """A text on its way into the other language and back.

    Attributes:
        example_id, side, iteration: what its draws follow from; without an iteration it goes by beam search.
        text: as it is now.
        pivot: in the other language, once it has been there.
        fault: why it got no further.
    """

    example_id: bytes
    side: int
    iteration: int | None
    text: str
    pivot: str = ""
    fault: str | None = None


def back_translations(generation: Generation, plan: Plan, originals: pa.Table) -> tuple[list[Written], str]:
    """The variants of some originals, in the order of these, and what they were computed on."""
    ids = originals["example_id"].to_pylist()
    texts = [originals[f"text_{letter}"].to_pylist() for letter in plan.letters()]
    by_beam = _ROUNDS[generation.pair_sides] if plan.is_pair else 1
    # By row, side and iteration: variants of a pair that go by beam search share their journeys.
    journeys: dict[tuple[int, int, int | None], _Journey] = {}
    wanted = []
    for row, example_id in enumerate(ids):
        for iteration in range(generation.num_variants):
            side = _side(generation, plan.seed, example_id, iteration) if plan.is_pair else 0
            drawn = None if iteration < by_beam else iteration
            parts: list[_Journey | None] = [None] * len(texts)
            for number in range(len(texts)) if SIDES[side] == "both" else (side,):
                key = row, number, drawn
                if key not in journeys:
                    journeys[key] = _Journey(example_id, number, drawn, texts[number][row])
                parts[number] = journeys[key]
            wanted.append((row, iteration, SIDES[side] if plan.is_pair else None, parts))

    for direction, (folder, digest) in enumerate(generation.models):
        model = load_generator(folder, "seq2seq", digest)
        for is_sampled in (False, True):
            going = [j for j in journeys.values() if j.fault is None and (j.iteration is not None) == is_sampled]
            _translate(going, model, generation, direction, plan.seed)
    written = [
        _variant(row, iteration, side, [column[row] for column in texts], parts)
        for row, iteration, side, parts in wanted
    ]
    return written, model.computed_on


def _side(generation: Generation, seed: int, example_id: bytes, iteration: int) -> int:
    """What a variant of a pair changes, as number in `SIDES`."""
    draws = generation.draws(seed, "side", example_id, iteration, 1)
    return int(sides(np.array([iteration]), generation.pair_sides, draws)[0])


def _translate(
    journeys: Sequence[_Journey], model: Generator, generation: Generation, direction: int, seed: int
) -> None:
    """Take journeys one language further: all by beam search, or all by their draws."""
    prompts = model.encode([generation.prefixes[direction] + journey.text for journey in journeys])
    fitting = []
    for journey, prompt in zip(journeys, prompts, strict=True):
        if len(prompt) <= model.room:
            fitting.append((journey, prompt, min(2 * len(prompt) + 10, MOST_NEW_TOKENS, model.room)))
        else:
            journey.fault = "too_long"
    draws = [
        generation.draws(seed, f"{direction}{journey.side}", journey.example_id, journey.iteration, limit)
        for journey, _, limit in fitting
        if journey.iteration is not None
    ]
    found = model.write(
        [prompt for _, prompt, _ in fitting],
        [limit for _, _, limit in fitting],
        draws=draws or None,
        temperature=generation.temperature,
        top_k=generation.top_k,
    )
    for (journey, _, _), (token_ids, has_end) in zip(fitting, found, strict=True):
        journey.pivot, journey.text = journey.text, " ".join(model.decode(token_ids).split())
        journey.fault = "no_end" if not has_end else None if journey.text else "empty"


def _variant(
    row: int, iteration: int, side: str | None, originals: Sequence[str], parts: Sequence[_Journey | None]
) -> Written:
    """What became of the journeys of a variant."""
    faults = [
        part.fault or _fault(original, part.text)
        for original, part in zip(originals, parts, strict=True)
        if part is not None
    ]
    fault = next(filter(None, faults), None)
    if fault is not None:
        return Written(row, iteration, side, fault=fault)
    texts = (original if part is None else part.text for original, part in zip(originals, parts, strict=True))
    return Written(row, iteration, side, (*texts,), (*(None if part is None else part.pivot for part in parts),))


def _fault(original: str, text: str) -> str | None:
    """What is wrong with a text that came back."""
    if not LEAST_RATIO * len(original) <= len(text) <= MOST_RATIO * len(original):
        return "length"
    script = main_script(original)
    return "script" if script is not None and main_script(text) != script else None
