"""Variants a second by the rule operators, beside a loop over the words of one text after another.

    python benchmarks/augment.py [--quick] [--rows 10000] [--variants 20] [--rounds 3] [--folder DIR]

Both make variants of the same texts, in one process on one core: of about as many words as those of SST-2 (9 on
average, 1 to 52), drawn from 12,000 by Zipf's law.
- kd: `kd augment` whole: texts read, split, tagged (by the heuristic, so that the tagger of an extra is not what is
  measured) and counted, variants made, compared with each other and all originals, and written with their provenance.
- loop: what scripts do (castorini/d-bert): one random number a word, words drawn from lists by tag, a window, texts
  that are there already left out by a set. It writes nothing and keeps no provenance; its texts are tagged before.
Ways take turns within a round; seconds are those of the processor. The target is of the variants that are made, before
equal ones are left out.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from report import Figure, compared, finish, take_turns

from kd.pipeline.stage import StageContext, execute
from kd.stages.augment import Augment
from kd.stages.augment.tagger import load_tagger
from kd.stages.augment.words import split_words

TARGET_PER_S = 20_000.0
WAYS = {"tang": ("mask", "pos", "ngram"), "all without files": ("mask", "pos", "delete", "swap", "ngram")}


def make_texts(count: int) -> list[str]:
    """Texts of words that no language has."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.lognormal(1.94, 0.72, count)), 1, 52).astype(int)
    shares = 1 / np.arange(1, 12_001)
    endings = ("", "ly", "ing", "ness", "ive", "ed")
    syllables = ("ba", "co", "di", "fu", "ge", "hi", "lo", "mu", "ne", "pa", "ri", "so")
    words = ["".join(syllables[i // 12**k % 12] for k in range(4)) + endings[i % 6] for i in range(12_000)]
    drawn = iter(rng.choice(12_000, lengths.sum(), p=shares / shares.sum()).tolist())
    return [" ".join(words[next(drawn)] for _ in range(length)) for length in lengths]


def loop(texts: Sequence[tuple[list[str], list[int]]], num_variants: int) -> int:
    """Variants as a script makes them; how many were new."""
    pools: dict[int, list[str]] = {}
    for words, tags in texts:
        for word, tag in zip(words, tags, strict=True):
            pools.setdefault(tag, []).append(word)
    rng = random.Random(0)
    seen = {" ".join(words) for words, _ in texts}
    num_originals = len(seen)
    for words, tags in texts:
        for _ in range(num_variants):
            new = []
            for word, tag in zip(words, tags, strict=True):
                place = rng.random()
                if place < 0.1:
                    new.append("[MASK]")
                elif place < 0.2:
                    new.append(rng.choice(pools[tag]))
                else:
                    new.append(word)
            if rng.random() < 0.25:
                length = rng.randint(1, 5)
                start = rng.randint(0, max(0, len(new) - length))
                new = new[start : start + length]
            seen.add(" ".join(new))
    return len(seen) - num_originals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--rows", type=int, help="texts (default 10,000; 2,000 if quick)")
    parser.add_argument("--variants", type=int, default=20, help="of each text (default 20)")
    parser.add_argument("--rounds", type=int, help="timed rounds, after one warm-up (default 3; 1 if quick)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    num_rows = options.rows or (2_000 if options.quick else 10_000)
    rounds = options.rounds or (1 if options.quick else 3)
    texts = make_texts(num_rows)
    tag = load_tagger("heuristic").tag
    tagged = [(words, tag(words)) for words in map(split_words, texts)]
    num_made = num_rows * options.variants
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "texts.parquet"
        pq.write_table(pa.table({"text": texts}), source)

        def augment(operators: tuple[str, ...]) -> None:
            stage = Augment(
                dataset=str(source),
                text_column="text",
                operators=operators,
                num_variants=options.variants,
                tagger="heuristic",
                output_dir=str(Path(folder) / "corpus"),
            )
            done = execute(stage, StageContext(overwrite=True)).summary
            assert done["variants_made"] == num_made, done

        for name, operators in WAYS.items():
            ways = {"kd": lambda o=operators: augment(o), "loop": lambda: loop(tagged, options.variants)}
            seconds = take_turns(ways if name == "tang" else {"kd": ways["kd"]}, rounds, clock=time.process_time)
            kd, *others = compared(name, seconds, unit="variants/s", number=lambda s: num_made / s)
            figures += [replace(kd, at_least=TARGET_PER_S), *others]
    settings = {"rows": num_rows, "variants": options.variants, "rounds": rounds, "clock": "processor"}
    finish("augment", figures, settings)


if __name__ == "__main__":
    main()
