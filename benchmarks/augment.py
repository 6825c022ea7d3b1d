"""Variants a second by the rule operators and by a masked LM, beside loops over the words of one text after another.

    python benchmarks/augment.py [--quick] [--only rules masked-lm] [--data FOLDER] [--rows 10000] [--sentences 400]
                                 [--variants 20] [--rounds 3] [--folder DIR]

**Rules.** Both ways make variants of the same texts, in one process on one core: of about as many words as those of
SST-2 (9 on average, 1 to 52), drawn from 12,000 by Zipf's law.
- kd: `kd augment` whole: texts read, split, tagged (by the heuristic, so that the tagger of an extra is not what is
  measured) and counted, variants made, compared with each other and all originals, and written with their provenance.
- loop: what scripts do (castorini/d-bert): one random number a word, words drawn from lists by tag, a window, texts
  that are there already left out by a set. It writes nothing and keeps no provenance; its texts are tagged before.
The target is of the variants that are made, before equal ones are left out.

**Masked LM**, as TinyBERT has it: 15 candidates for every content word of one piece, then 20 variants. Texts: Banking77
(with --data, a folder that holds sst2/train.parquet, SST-2). Model: MiniLM's encoder (6 layers, 384 wide) with a
masked-LM head of random weights.
- kd: `kd augment --preset tinybert` whole, as above, with the model loaded;
- loop: what TinyBERT's `data_augmentation.py` does: one text and one word at a time through the same model, with a
  graph for gradients, the whole vocabulary scored at every token and sorted at the word's; words of several pieces are
  compared with the whole word table, of the model in the place of GloVe. Nothing is written;
- loop, kd's kernels: the same without the graph, and with kd's way of multiplying float32 matrices, which tells batches
  from kernels.
Loops go over every eighth text and are counted up: their speed does not depend on how many there are, while kd has to
split, look up and write whatever there is. Before anything is timed, the candidates of kd and of the loop are compared:
they must be the same.

Ways take turns within a round. Seconds of the rules are those of the processor, on one core; of the masked LM those of
the clock, and every way has all cores (OMP_NUM_THREADS, if it is set): kd for a batch each, torch for one in the loops.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from report import Figure, Timed, compared, finish, take_turns

from kd.pipeline.progress import mute_libraries
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.threads import threads_per_process
from kd.stages.augment import Augment
from kd.stages.augment.candidates import is_content_word
from kd.stages.augment.tagger import load_tagger
from kd.stages.augment.words import split_words

TARGET_PER_S = 20_000.0
MASKED_LM_TARGET = 8.0
NUM_CANDIDATES, REPLACED = 15, 0.4
LOOP_OVER = 8
SAME_SCORE = 1e-3
"""Scores nearer than this may come in either order: batches add up in another order than single texts."""
BANKING77 = Path(__file__).parent.parent / "workflows" / "data" / "banking77" / "train.parquet"
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


def rule_figures(folder: Path, num_rows: int, num_variants: int, rounds: int) -> list[Figure]:
    texts = make_texts(num_rows)
    tag = load_tagger("heuristic").tag
    tagged = [(words, tag(words)) for words in map(split_words, texts)]
    figures: list[Figure] = []
    for name, operators in WAYS.items():

        def augment(operators: tuple[str, ...] = operators) -> None:
            kd_augment(folder, texts, operators=operators, num_variants=num_variants)

        ways = {"kd": augment, "loop": lambda: loop(tagged, num_variants)}
        seconds = take_turns(ways if name == "tang" else {"kd": augment}, rounds, clock=time.process_time)
        kd, *others = compared(name, seconds, unit="variants/s", number=lambda s: num_rows * num_variants / s)
        figures += [replace(kd, at_least=TARGET_PER_S), *others]
    return figures


def kd_augment(folder: Path, texts: Sequence[str], **options: Any) -> None:
    """`kd augment` over some texts, all variants made."""
    source = folder / "texts.parquet"
    pq.write_table(pa.table({"text": texts}), source)
    output = str(folder / "corpus")
    stage = Augment(dataset=str(source), text_column="text", tagger="heuristic", output_dir=output, **options)
    done = execute(stage, StageContext(overwrite=True)).summary
    assert done["variants_made"] == done["originals"] * stage.resolved["num_variants"], done


# --- masked LM ---------------------------------------------------------------------------------------------------


def make_masked_lm(folder: Path) -> Path:
    """MiniLM with a masked-LM head that was never trained."""
    import torch
    from transformers import AutoTokenizer, BertForMaskedLM

    from kd.stages.packaged import checkpoint_source

    source = checkpoint_source("minilm", option="the benchmark's model")
    torch.manual_seed(0)
    BertForMaskedLM.from_pretrained(source).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


class Loop:
    """TinyBERT's way: a forward pass per word."""

    def __init__(self, folder: Path, *, kd_kernels: bool) -> None:
        from transformers import AutoTokenizer, BertForMaskedLM

        from kd.stages.augment.vocabulary import whole_words
        from kd.stages.cache_teacher.onednn import use_onednn

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = BertForMaskedLM.from_pretrained(folder).eval()
        self._words = whole_words(self.tokenizer)
        self._kd_kernels = kd_kernels
        if kd_kernels:
            use_onednn(self._model)
        table_VH = self._model.get_input_embeddings().weight.detach().numpy().astype(np.float64)
        self._unit_VH = table_VH / np.linalg.norm(table_VH, axis=1, keepdims=True)

    def scores(self, text: str, before: int) -> Any:
        """Of the vocabulary in the place of a piece, given the number of those before it."""
        import torch

        tokenizer = self.tokenizer
        masked, tokens = tokenizer.tokenize(text), tokenizer.tokenize(text)
        masked[before] = tokenizer.mask_token
        both = [tokenizer.cls_token, *masked, tokenizer.sep_token, *tokens, tokenizer.sep_token]
        segments = [0] * (len(tokens) + 2) + [1] * (len(tokens) + 1)
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(both)])
        with torch.inference_mode(self._kd_kernels):
            return self._model(ids, token_type_ids=torch.tensor([segments])).logits[0, before + 1]

    def masked_places(self, words: Sequence[str]) -> dict[int, int]:
        """The content words of one piece, and how many pieces come before each."""
        counts = [len(self.tokenizer.tokenize(word)) for word in words]
        starts = np.cumsum([0, *counts]).tolist()
        return {n: starts[n] for n, word in enumerate(words) if counts[n] == 1 and is_content_word(word)}

    def candidates(self, words: Sequence[str]) -> dict[int, list[str]]:
        """Of the content words by place, the best first."""
        import torch

        text, places = " ".join(words), self.masked_places(words)
        found: dict[int, list[str]] = {}
        for number, word in enumerate(words):
            if number in places:
                ranked = torch.argsort(self.scores(text, places[number]), descending=True).tolist()
                found[number] = self._best(ranked, word)
            elif is_content_word(word):
                pieces = self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(word))
                nearness = self._unit_VH @ self._unit_VH[pieces].mean(0)
                found[number] = self._best(np.argsort(-nearness).tolist(), word)
        return found

    def _best(self, ranked: list[int], word: str) -> list[str]:
        best: list[str] = []
        for piece in ranked:
            other = self._words.get(piece, word)
            if other.lower() != word.lower():
                best.append(other)
            if len(best) == NUM_CANDIDATES:
                break
        return best

    def variants(self, texts: Sequence[Sequence[str]], num_variants: int) -> int:
        """How many different ones were made."""
        rng = random.Random(0)
        seen: set[str] = set()
        for words in texts:
            candidates = self.candidates(words)
            for _ in range(num_variants):
                new = [*words]
                for number, others in candidates.items():
                    if rng.random() < REPLACED:
                        new[number] = rng.choice(others)
                seen.add(" ".join(new))
        return len(seen)


def check_candidates(masked_lm: Path, loop: Loop, texts: Sequence[Sequence[str]]) -> str:
    """That kd finds the candidates of the loop; says of how many words. Equal scores may be in either order."""
    from kd.stages.augment.mlm import MaskedLM

    model = MaskedLM(str(masked_lm), NUM_CANDIDATES)
    most = max(map(len, texts))
    found = model.fill([blank for row, words in enumerate(texts) for blank in model.blanks(words, row * most)])
    vocabulary, same, count = loop.tokenizer.get_vocab(), 0, 0
    for row, words in enumerate(texts):
        expected, places = loop.candidates(words), loop.masked_places(words)
        assert {row * most + number for number in places} == {p for p in found if p // most == row}, words
        for number, before in places.items():
            count += 1
            odd = {*expected[number]} ^ {*found[row * most + number]}
            same += not odd
            if odd:
                scores = loop.scores(" ".join(words), before)
                edge = scores[vocabulary[expected[number][-1]]]
                assert all(abs(scores[vocabulary[word]] - edge) < SAME_SCORE for word in odd), (words, number, odd)
    return f"masked LM: {same} of {count} words have the very candidates of the loop, the others up to equal scores"


def masked_lm_figures(
    folder: Path, texts: Sequence[str], num_variants: int, rounds: int
) -> tuple[list[Figure], list[str]]:
    import torch

    torch.set_num_threads(threads_per_process(1))
    masked_lm = make_masked_lm(folder / "masked-lm")
    words = [split_words(text) for text in texts]
    loops = {"loop": Loop(masked_lm, kd_kernels=False), "loop, kd's kernels": Loop(masked_lm, kd_kernels=True)}
    looped = words[::LOOP_OVER]
    note = check_candidates(masked_lm, loops["loop"], looped)

    def augment() -> None:
        kd_augment(folder, texts, preset="tinybert", masked_lm=str(masked_lm), num_variants=num_variants)

    def timed(way: Loop) -> Timed:
        started = time.perf_counter()
        way.variants(looped, num_variants)
        return Timed((time.perf_counter() - started) * len(words) / len(looped))

    ways = {"kd": augment, **{name: lambda way=way: timed(way) for name, way in loops.items()}}
    seconds = take_turns(ways, rounds)
    made = len(texts) * num_variants
    figures = compared(
        "masked LM", seconds, unit="variants/s", number=lambda s: made / s, at_least={"loop": MASKED_LM_TARGET}
    )
    return figures, [note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, sentences and rounds")
    parser.add_argument(
        "--only", nargs="+", choices=("rules", "masked-lm"), help="parts to run (default both; the rules if quick)"
    )
    parser.add_argument("--data", type=Path, help="folder with sst2/train.parquet, for the masked LM")
    parser.add_argument("--rows", type=int, help="texts of the rules (default 10,000; 2,000 if quick)")
    parser.add_argument("--sentences", type=int, help="texts of the masked LM (default 400; 40 if quick)")
    parser.add_argument("--variants", type=int, default=20, help="of each text (default 20)")
    parser.add_argument("--rounds", type=int, help="timed rounds, after one warm-up (default 3; 1 if quick)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    num_rows = options.rows or (2_000 if options.quick else 10_000)
    num_sentences = options.sentences or (40 if options.quick else 400)
    rounds = options.rounds or (1 if options.quick else 3)
    parts = options.only or (["rules"] if options.quick else ["rules", "masked-lm"])
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if "rules" in parts:
            figures += rule_figures(Path(folder), num_rows, options.variants, rounds)
        if "masked-lm" in parts:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            mute_libraries()  # MiniLM comes without the head that it is given
            texts = some_texts(options.data, num_sentences)
            found, notes = masked_lm_figures(Path(folder), texts, options.variants, rounds)
            figures += found
    settings = {"rows": num_rows, "sentences": num_sentences, "variants": options.variants, "rounds": rounds}
    finish("augment", figures, settings, notes=notes)


def some_texts(data: Path | None, count: int) -> list[str]:
    """Texts spread over a training set."""
    table = pq.read_table(data / "sst2" / "train.parquet" if data else BANKING77)
    texts = table["sentence" if data else "text"].to_pylist()
    return list(dict.fromkeys(texts[:: max(1, len(texts) // (count + count // 10))]))[:count]


if __name__ == "__main__":
    main()
