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
        RefusedError: the folder is not one of WordNet, or a line of an index is not as wndb(5WN) has it.
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
        if not [*_synsets(Path(folder) / f"index.{name}")]:
            raise _damaged(Path(folder) / f"index.{name}", "it has no entries")
    return digest.hexdigest()


def _damaged(file: Path, what: str) -> RefusedError:
    return RefusedError(
        f"{file} is no file of WordNet as it was published: {what}",
        fix="unpack WordNet again, and copy its files as binary: places in data files are counted in bytes",
    )


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
        data = _Data(Path(folder) / f"data.{name}")
        for lemma in wanted & index.keys():
            others = [other for offset in index[lemma] for other in data.members(offset)]
            others = [other for other in dict.fromkeys(others) if other.isalpha() and other.lower() != lemma]
            found[lemma, letter] = others
    return [
        [cased_like(other, word) for other in found.get((word.lower(), part_of_speech(tag) or ""), ())]
        for word, tag in zip(words, tags, strict=True)
    ]


def _synsets(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Lemma and places of its synsets in the data file, most frequent sense first."""
    # By line feeds alone: in a text, other characters end lines too.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip() or line.startswith(b" "):  # the licence
            continue
        try:
            fields = line.decode().split()
            count = int(fields[2])
            places = [int(offset) for offset in fields[-count:]]
            # lemma, part of speech, count, pointers, their symbols, senses, tagged senses, places
            if not 0 < count <= len(fields) - 6 or min(places) < 0:
                raise ValueError
        except UnicodeDecodeError:
            raise _damaged(file, f"line {number} is not UTF-8") from None
        except (ValueError, IndexError):
            raise _damaged(file, f"line {number} is cut off or none of an index: {_shown(line)}") from None
        yield fields[0], places


class _Data:
    """A data file: synsets by the byte at which their line begins."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._bytes = file.read_bytes()

    def members(self, offset: int) -> list[str]:
        """The words of the synset at this place, without the marks of where an adjective may stand."""
        end = self._bytes.find(b"\n", offset)
        line = self._bytes[offset : end if end >= 0 else None]
        try:
            fields = line.decode().split()
            count = int(fields[3], 16)
            # Its own place stands first in a line; 4 fields, 2 per word, and how many pointers follow.
            if int(fields[0]) != offset or len(fields[0]) != 8 or not 0 < count <= (len(fields) - 5) // 2:
                raise ValueError
        except UnicodeDecodeError:
            raise _damaged(self._file, f"line {self._line_of(offset)} is not UTF-8") from None
        except (ValueError, IndexError):
            what = f"no synset stands at byte {offset}, line {self._line_of(offset)}: {_shown(line)}"
            if b"\r\n" in self._bytes[: offset + len(line) + 1]:
                what += "; its lines end with CR LF"
            raise _damaged(self._file, what) from None
        return [fields[4 + 2 * number].partition("(")[0] for number in range(count)]

    def _line_of(self, offset: int) -> int:
        return self._bytes.count(b"\n", 0, offset) + 1


def _shown(line: bytes) -> str:
    """The start of a line, for messages."""
    return repr(line[:60].decode(errors="replace"))
