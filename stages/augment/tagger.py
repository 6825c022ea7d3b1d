"""Parts of speech without a network: HanTa where it is installed, else a named heuristic.

HanTa (`pip install HanTa`, LGPL; extra `offline`) is a trigram tagger with its models in the wheel. Its model file is a
pickle, so it is read by an unpickler that knows two names of numpy and no other. The heuristic needs nothing: closed
classes and suffixes of English, ten coarse tags.
"""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ...pipeline.errors import RefusedError, UsageError, near_match

TAGGERS = ("auto", "hanta", "heuristic")
LANGUAGES = {"en": "morphmodel_en.pgz", "de": "morphmodel_ger.pgz", "nl": "morphmodel_dutch.pgz"}
"""Languages of HanTa, and the model file of each."""

FUSED_TAGS = {
    "NN": "NN1",
    "NN0": "NN1",
    "VVI": "VVB",
    **{f"V{verb}{form}": f"VX{form.replace('I', 'B')}" for verb in "BDH" for form in "BDGINZ"},
    "PUL": "PUB",
    "PUR": "PUB",
    "": "UNC",
    "!!!": "UNC",
    "UNKNOWN": "UNC",
    "ZZ0": "UNC",
    "ITJ": "UNC",
}
"""English tags (CLAWS C5) that share a pool, so that pools are not tiny: nouns singular or without number, base
form and infinitive, the forms of be, do and have, brackets, and whatever is hardly a word."""


class Tagger(Protocol):
    """Tags the words of one text.

    Attributes:
        names: tag names; a tag is an index into them.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def tag(self, words: Sequence[str]) -> list[int]:
        """One tag per word. Depends on these words alone."""


def tagger_identity(tagger: str, language: str = "en") -> dict[str, str]:
    """What is going to tag: name, version and model digest, without loading it.

    Args:
        tagger: "hanta", "heuristic", or "auto" for the first that is installed.
        language: one of `LANGUAGES`.

    Raises:
        UsageError: unknown name or language.
        RefusedError: "hanta" is asked for and not installed.
    """
    if tagger not in TAGGERS:
        raise UsageError(f"tagger {tagger!r} does not exist{near_match(tagger, TAGGERS)}")
    if language not in LANGUAGES:
        raise UsageError(f"language {language!r} has no tagger{near_match(language, LANGUAGES)}")
    if tagger != "heuristic":
        file = _model_file(language)
        if file is not None:
            digest = blake2b(file.read_bytes(), digest_size=16).hexdigest()
            return {"name": "hanta", "version": version("HanTa"), "model": file.name, "model_digest": digest}
        if tagger == "hanta":
            raise RefusedError(
                "the tagger 'hanta' is not installed",
                fix='pip install "kd-pipeline[offline]", or --tagger heuristic',
            )
    return {"name": "heuristic", "version": HEURISTIC_VERSION}


@lru_cache(maxsize=2)
def load_tagger(name: str, language: str = "en") -> Tagger:
    """The tagger that `tagger_identity` named."""
    return HeuristicTagger() if name == "heuristic" else HantaTagger(language)


def _model_file(language: str) -> Path | None:
    spec = importlib.util.find_spec("HanTa")
    folders = spec.submodule_search_locations if spec is not None else None
    file = Path(next(iter(folders))) / LANGUAGES[language] if folders else None
    return file if file is not None and file.is_file() else None


# HanTa -----------------------------------------------------------------------------------------------------------


class _ModelUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy numbers, nothing that could run code."""

    ALLOWED = frozenset({("numpy._core.multiarray", "scalar"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy.core.", "numpy._core."), name) not in self.ALLOWED:
            raise RefusedError(
                f"the tagger model wants to load {module}.{name}",
                details=[f"allowed: {', '.join(sorted('.'.join(pair) for pair in self.ALLOWED))}"],
                fix="reinstall HanTa from PyPI; its models hold numbers and text only",
            )
        return super().find_class(module, name)


def read_model(file: Path) -> Any:
    """The content of a gzipped HanTa model.

    Raises:
        RefusedError: it would import anything else than numpy's scalars.
    """
    with gzip.open(file) as stream:
        return _ModelUnpickler(stream).load()


_State = tuple[int, int]
"""The tags of the last two words."""


class HantaTagger:
    """HanTa's sentence tagger, with the same result several times faster.

    What HanTa works out about a word is kept, and its search over tags looks only at the tags a word can have.
    """

    def __init__(self, language: str = "en") -> None:
        from HanTa.HanoverTagger import EMPTY, END, START, UNKNOWN, HanoverTagger

        file = _model_file(language)
        assert file is not None, "tagger_identity has checked"
        self._hanta = HanoverTagger(None, read_model(file))
        # As when HanTa loads the file itself: unknown words are guessed.
        self._hanta.strict = False
        self._start, self._end, self._unknown, self._empty = (EMPTY, START), END, UNKNOWN, EMPTY
        # Tags of words, not of the morphemes inside them: those that may end a word.
        names = self._hanta.int2tag
        found = {number: tag for number, tag in names.items() if number > 0 and -number in names}
        fused = {number: FUSED_TAGS.get(tag, tag) if language == "en" else tag for number, tag in found.items()}
        self.names = tuple(sorted({*fused.values(), "UNC"}))
        index = {name: i for i, name in enumerate(self.names)}
        self._number = {number: index[name] for number, name in fused.items()}
        self._uncertain = index["UNC"]
        self._word_tags: dict[tuple[str, bool], dict[int, float]] = {}

    def tag(self, words: Sequence[str]) -> list[int]:
        """One tag per word; UNC for all when the model finds no way through the text."""
        if not words:
            return []
        number = self._number
        path = self._best_path(words)
        if path is None:
            return [self._uncertain] * len(words)
        return [number.get(tag, self._uncertain) for tag in path]

    def _tags_of(self, word: str, is_first: bool) -> dict[int, float]:
        """HanTa's log probabilities of the tags of a word; case counts except at the start."""
        key = (word, is_first)
        tags = self._word_tags.get(key)
        if tags is None:
            found = self._hanta._tag_word(word, cutoff=5, casesensitive=not is_first, conditional=True)
            tags = {tag: float(value) for tag, value in found}
            if [*tags] == [self._unknown]:
                tags = {}
            self._word_tags[key] = tags
        return tags

    def _best_path(self, words: Sequence[str]) -> list[int] | None:
        """HanTa's `tag_sent_viterbi`: Viterbi over pairs of tags, going on from the five best states."""
        transitions = self._hanta.LP_trans_word
        row: dict[_State, float] = {self._start: 0.0}
        came_from: list[dict[_State, _State]] = []
        for position, word in enumerate(words):
            tags = self._tags_of(word, position == 0)
            bound = sorted(row.values(), reverse=True)[5] - 1 if len(row) > 5 else -1e6
            next_row: dict[_State, float] = {}
            sources: dict[_State, _State] = {}
            for state, so_far in row.items():
                if so_far < bound:
                    continue
                steps, last = transitions[state], state[1]
                for tag, of_word in tags.items() if tags else ((tag, 0.0) for tag in steps if tag != self._end):
                    if tag in steps:
                        value = so_far + steps[tag] + of_word
                        new = (last, tag)
                        if value > next_row.get(new, -1e6):
                            next_row[new] = value
                            sources[new] = state
            if not next_row:
                return None
            row = next_row
            came_from.append(sources)
        nowhere = float("-inf")
        value, best = max(
            ((so_far + transitions[s].get(self._end, nowhere), s) for s, so_far in row.items()), key=_first
        )
        if value == nowhere:
            return None
        path = []
        for sources in reversed(came_from):
            path.append(best[1])
            best = sources[best]
        return path[::-1]


def _first(pair: tuple[float, _State]) -> float:
    return pair[0]


# Heuristic -------------------------------------------------------------------------------------------------------

HEURISTIC_VERSION = "1"
_CLOSED = {
    "DET": "a an the this that these those some any no every each all both either neither another such what which",
    "PRON": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself "
    "yourself himself herself itself ourselves themselves who whom whose someone anyone everyone nobody nothing "
    "something everything anything one there",
    "PREP": "of in on at by for with about against between into through during before after above below to from up "
    "down out off over under as than like without within along across behind beyond toward towards upon",
    "CONJ": "and or but nor so yet if because while although though unless until since when where whether",
    "AUX": "be am is are was were been being do does did have has had having will would shall should can could may "
    "might must 's 'm 're 've 'll 'd ca wo",
    "ADV": "not n't never very too also just only even still again ever always often here now then well much more most "
    "less least how why quite rather almost",
}
_CLOSED_TAG = {word: tag for tag, words in _CLOSED.items() for word in words.split()}
CLOSED_CLASS = frozenset(_CLOSED_TAG)
"""English words of the closed classes, in small letters: articles, pronouns, prepositions, auxiliaries and the like."""
_SUFFIXES = (
    ("ly", "ADV"),
    *((suffix, "ADJ") for suffix in ("ous", "ful", "less", "able", "ible", "ive", "ish", "ic", "ical", "est")),
    *((suffix, "VERB") for suffix in ("ing", "ed", "ize", "ise", "ify")),
    *((suffix, "NOUN") for suffix in ("tion", "ment", "ness", "ity", "ism", "ist", "ance", "ence", "ship", "hood")),
)


class HeuristicTagger:
    """Closed classes, then shape, then suffix; anything else is a noun. For places without HanTa."""

    names = ("ADJ", "ADV", "AUX", "CONJ", "DET", "NOUN", "NUM", "PREP", "PRON", "PUNCT", "VERB")

    def __init__(self) -> None:
        self._index = {name: i for i, name in enumerate(self.names)}
        self._known: dict[str, int] = {}

    def tag(self, words: Sequence[str]) -> list[int]:
        """One tag per word, whatever stands around it."""
        return [self._tag_of(word) for word in words]

    def _tag_of(self, word: str) -> int:
        tag = self._known.get(word)
        if tag is None:
            tag = self._known[word] = self._index[_heuristic_tag(word.lower())]
        return tag


def _heuristic_tag(word: str) -> str:
    if word in _CLOSED_TAG:
        return _CLOSED_TAG[word]
    if not any(character.isalnum() for character in word):
        return "PUNCT"
    if word[0].isdigit():
        return "NUM"
    return next((tag for suffix, tag in _SUFFIXES if len(word) > len(suffix) + 2 and word.endswith(suffix)), "NOUN")
