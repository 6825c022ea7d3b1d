"""A small WordNet."""

from __future__ import annotations

from pathlib import Path

import pytest

LICENCE = "  1 This software and database is being provided to you\n"
SYNSETS = {
    "noun": [["film", "movie", "picture"], ["film", "photographic_film"], ["film", "cinema"], ["dog", "Rover"]],
    "verb": [["film", "shoot", "take"], ["see", "watch"]],
    "adj": [["good", "fine(p)"], ["small", "little"]],
    "adv": [["well", "good"]],
}


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the format of wndb(5WN)."""
    folder = tmp_path_factory.mktemp("dict")
    for name, synsets in SYNSETS.items():
        data, places = LICENCE, {}
        for words in synsets:
            offset = len(data)
            for word in words:
                places.setdefault(word.partition("(")[0].lower(), []).append(offset)
            members = " ".join(f"{word} 0" for word in words)
            data += f'{offset:08d} 03 {name[0]} {len(words):02x} {members} 000 | a gloss; "with words"\n'
        (folder / f"data.{name}").write_text(data)
        lines = [
            f"{lemma} {name[0]} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{offset:08d}' for offset in at)}  \n"
            for lemma, at in sorted(places.items())
        ]
        (folder / f"index.{name}").write_text(LICENCE + "".join(lines))
    return folder
