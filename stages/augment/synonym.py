"""Operator `synonym`: a word becomes a synonym of WordNet (Wei and Zou, 2019), from the files of the user.

Reads the database files of WordNet 3 (`index.noun`, `data.noun`, ... as the packages `wordnet-base` of Debian and
`WordNet-3.0/dict` have them; format: wndb(5WN)). kd brings none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from ...pipeline.errors import RefusedError
from .candidates import cased_like, is_content_word

_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_TAGS = {"n": ("NN", "NOUN"), "v": ("VV", "VERB"), "a": ("AJ", "ADJ"), "r": ("AV0", "ADV")}
"""How the tags of HanTa's English model and of the heuristic begin that are nouns, verbs, adjectives and adverbs."""


def wordnet_digest(folder: str | Path) -> str:
    """32 hex: hash of the files that are read.

    Raises:
        RefusedError: the folder is not one of WordNet.
    """
    digest = blake2b(digest_size=16)
    for name in _FILES.values():
        for kind in ("index", "data"):
            file = Path(folder) / f"{kind}.{name}"
            if not file.is_file():
                raise RefusedError(
                    f"{folder} holds no WordNet: there is no {file.name}",
                    details=["expected: index.noun, data.noun, and the same of verb, adj and adv"],
                    fix="give --wordnet the folder `dict` of WordNet 3 (Debian: wordnet-base, /usr/share/wordnet)",
                )
            digest.update(file.read_bytes())
    return digest.hexdigest()


def part_of_speech(tag: str) -> str | None:
    """WordNet's letter for the name of a tag; None for words it does not know.

    >>> [part_of_speech(tag) for tag in ("NN1", "VERB", "AJ0", "AV0", "DET", "NP0")]
    ['n', 'v', 'a', 'r', None, None]
    """
    return next((letter for letter, names in _TAGS.items() if tag.startswith(names)), None)


def synonym_lists(words: Sequence[str], tags: Sequence[str], folder: str | Path) -> list[list[str]]:
    """Per (word, tag name) the other single words of its synsets with this part of speech, most frequent sense first.

    A word that is not a base form has none ("films" is not "film"), so that an inflected form never becomes a base
    form. Capitals are those of the word.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for letter, name in _FILES.items():
        index = dict(_synsets(Path(folder) / f"index.{name}"))
        wanted = {
            word.lower()
            for word, tag in zip(words, tags, strict=True)
            if part_of_speech(tag) == letter and is_content_word(word)
        }
        data = (Path(folder) / f"data.{name}").read_bytes()
        for lemma in wanted & index.keys():
            others = [other for offset in index[lemma] for other in _members(data, offset)]
            others = [other for other in dict.fromkeys(others) if other.isalpha() and other.lower() != lemma]
            found[lemma, letter] = others
    return [
        [cased_like(other, word) for other in found.get((word.lower(), part_of_speech(tag) or ""), ())]
        for word, tag in zip(words, tags, strict=True)
    ]


def _synsets(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Lemma and places of its synsets in the data file, most frequent sense first."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the licence
            fields = line.split()
            yield fields[0], [int(offset) for offset in fields[-int(fields[2]) :]]


def _members(data: bytes, offset: int) -> Iterator[str]:
    """The words of the synset at this place, without the marks of where an adjective may stand."""
    fields = data[offset : data.index(b"\n", offset)].decode().split()
    for number in range(int(fields[3], 16)):
        yield fields[4 + 2 * number].partition("(")[0]
