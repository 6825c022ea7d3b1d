"""The operators by name, how often they act, and published settings. Light: the command line reads it."""

from __future__ import annotations

from typing import Any

WORD_OPERATORS = ("mask", "pos", "synonym", "neighbour", "mlm", "delete", "swap")
"""Operators that share the draw of a word: their probabilities sum to at most 1."""
REPLACING = ("pos", "synonym", "neighbour", "mlm")
"""Word operators that put another word in a word's place; they leave named entities alone."""
OPERATORS = (*WORD_OPERATORS, "ngram", "exchange", "recombine", "mention")
"""Those that rules carry out, in the order in which provenance names them."""
PAIRED = ("exchange", "recombine")
"""Operators that need pairs of texts."""
TAGGED = ("pos", "synonym")
"""Operators that need parts of speech."""
LISTED = ("neighbour", "mlm")
"""Operators that take the nearest so many candidates."""
GENERATORS = ("back-translate", "lm")
"""Operators that have a model write variants of their own, beside those that the others make."""
FAULTS = {
    "back-translate": ("unchanged", "empty", "too_long", "no_end", "length", "script"),
    "lm": ("unchanged", "empty", "too_long", "no_separator"),
}
"""Why a text that a model wrote is left out."""
FOLDERS = {
    "wordnet": "synonym",
    "word_table": "neighbour",
    "masked_lm": "mlm",
    "translation_model": "back-translate",
    "back_translation_model": "back-translate",
    "language_model": "lm",
}
"""Options that name files, and the operator that needs them."""
MODEL_KINDS = {"translation_model": "seq2seq", "back_translation_model": "seq2seq", "language_model": "causal"}
"""Options that name a model that writes text, and what it must be."""

PROBABILITIES = {
    "mask": 0.1,
    "pos": 0.1,
    "synonym": 0.1,
    "neighbour": 0.1,
    "mlm": 0.4,
    "delete": 0.1,
    "swap": 0.1,
    "ngram": 0.25,
    "exchange": 0.5,
    "recombine": 0.1,
    "mention": 0.5,
}
"""Of an operator that is asked for without one: as Tang et al. (2019), Wei and Zou (2019) and TinyBERT have them."""

PRESETS: dict[str, dict[str, Any]] = {
    # Tang et al., 2019, as in the paper.
    "tang": {"operators": ("mask", "pos", "ngram"), "num_variants": (20, 10), "pair_sides": "cycle"},
    # castorini/d-bert, what its scripts do by default: no window; one side of a pair or both by a draw; a single text
    # that keeps no word makes no variant.
    "dbert-code": {
        "operators": ("mask", "pos"),
        "num_variants": (20, 20),
        "pair_sides": "random",
        "drop_all_changed": True,
    },
    # TinyBERT (Jiao et al., 2020), data_augmentation.py: 20 of a text (SST-2, QNLI), 10 of each side of a pair.
    "tinybert": {"operators": ("mlm",), "num_variants": (20, 20), "pair_sides": "alternate", "num_candidates": 15},
}
"""Published settings; `num_variants` is for single texts and for pairs."""
DEFAULTS: dict[str, Any] = {
    "operators": ("mask", "pos", "ngram"),
    "num_variants": (3, 3),
    "pair_sides": "cycle",
    "drop_all_changed": False,
    "num_candidates": 15,
}
