"""What a GPU changes, in one go: capture, reading into pinned memory, training, and whether the numbers are the same.

    python benchmarks/gpu.py [--quick] [--rows 20000] [--device cuda]

- environment: the device, its memory, versions.
- capture: a teacher of BERT-base size (random weights) with logits kept in float32 and bfloat16, and with the states of
  all tokens of all layers in bfloat16; `no store` is the same batches with nothing kept. `device busy` is the share of
  time in which nvidia-smi saw a kernel at work while shards were computed and written.
- correctness: logits as stored against those of the same teacher in float32 on the processor.
- read: token states gathered into pinned memory, and copied from there to the device.
- train: steps of a BiLSTM and of a 4-layer BERT as in `train.py`, in float32, bfloat16 and float16, the share of time
  without a batch, and an epoch beside a live teacher.

Every part prints one JSON line when it is done, then all of it comes as one table and one JSON line. Without a CUDA
device it ends with an error; `--device cpu --quick` runs the same code on the processor with a teacher of two layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from relay import Relay
from report import Figure, Timed, compared, finish, take_turns
from train import (
    CLASSES,
    LOGITS,
    TOKENS,
    VOCABULARY,
    Workbench,
    live_figures,
    make_store,
    quiet_transformers,
    sst2_lengths,
    step_figures,
    store_rows,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MAX_LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a teacher of two layers, few rows and steps")
    parser.add_argument("--rows", type=int, help="of text and of the store (default 20,000; 400 if quick)")
    parser.add_argument("--steps", type=int, help="timed steps of each way and round (default 200; 3 if quick)")
    parser.add_argument("--batch-size", type=int, help="default 128; 8 if quick")
    parser.add_argument("--rounds", type=int, help="timed rounds, after one warm-up (default 3; 1 if quick)")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"error: this machine has no CUDA device (torch {torch.__version__})\n"
            "  fix: run it where there is one; --device cpu --quick runs the same code on the processor"
        )
    quick = options.quick
    rows, batch_size = options.rows or (400 if quick else 20_000), options.batch_size or (8 if quick else 128)
    steps, rounds = options.steps or (3 if quick else 200), options.rounds or (1 if quick else 3)

    quiet_transformers()
    figures: list[Figure] = []

    def part(name: str, found: list[Figure], **facts: Any) -> None:
        figures.extend(found)
        held = [{key: value for key, value in asdict(figure).items() if value is not None} for figure in found]
        print(json.dumps({"part": name, **facts, "figures": held}), flush=True)

    part("environment", [], **environment(options.device))
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as name:
        folder = Path(name)
        layers = 2 if quick else 12
        teacher, texts = make_teacher(folder / "teacher", layers), make_texts(rows)
        for dtype, signals in (("float32", "logits"), ("bfloat16", "logits"), ("bfloat16", "logits,hidden.tok@all")):
            case = Capture(teacher, texts, signals=signals, dtype=dtype, device=options.device, folder=folder)
            what = f"capture, {signals}, {dtype}"
            part(what, capture_figures(what, case, rounds))
            if signals == "logits":
                part(f"correctness, {dtype}", correctness_figures(case))
        store = make_store(folder / "store", sst2_lengths(rows), [LOGITS, TOKENS])
        part("read", read_figures(store, options.device, batch_size, rounds))
        bench = partial(Workbench, store, folder=folder, batch_size=batch_size, device=options.device)
        bench = partial(bench, warm_up=1 if quick else 20, teacher_layers=layers)
        of_steps = partial(bench, steps=rounds * steps)
        kinds = ["", "bf16"] if options.device == "cpu" else ["", "bf16", "fp16"]
        with Relay(3) as relay:
            for student in ("bilstm", "bert"):
                for autocast in kinds:
                    what = f"step, {student}, {autocast or 'float32'}"
                    case_of_steps = partial(of_steps, student=student, autocast=autocast)
                    part(what, step_figures(what, case_of_steps, relay, rounds))
            what = "step, bilstm, float32, hidden.tok"
            part(what, step_figures(what, partial(of_steps, signals=(LOGITS, TOKENS)), relay, rounds))
        for student in ["bilstm"] if quick else ["bilstm", "bert"]:
            what = f"epoch, {student}"
            part(what, live_figures(what, bench(steps=max(1, steps // 4), student=student), rounds))
    settings = {**vars(options), "rows": rows, "steps": steps, "batch_size": batch_size, "rounds": rounds}
    finish("gpu", figures, {**settings, **environment(options.device)})


def environment(device: str) -> dict[str, Any]:
    """The device and what drives it."""
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    if device != "cpu":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "name": found.name,
            "memory_gb": round(found.total_memory / 1e9, 1),
            "capability": f"{found.major}.{found.minor}",
            "bfloat16": torch.cuda.is_bf16_supported(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


# --- capture -----------------------------------------------------------------------------------------------------


class Capture:
    """A teacher and texts, captured into a store and not.

    Args:
        teacher: folder.
        texts: to capture.
        signals: to keep, as `kd cache-teacher --signals` takes them.
        dtype: to compute in.
        device: to compute on.
        folder: where stores are made.
    """

    def __init__(self, teacher: Path, texts: list[str], *, signals: str, dtype: str, device: str, folder: Path) -> None:
        from kd.pipeline.store import StoreIdentity, StoreLayout, array_spec, parse_signals
        from kd.stages.cache_teacher.stage import BATCH_TOKENS
        from kd.stages.cache_teacher.teacher import describe_teacher
        from kd.stages.cache_teacher.tokenize import encode

        self.teacher, self.dtype, self.device, self.num_rows = describe_teacher(str(teacher)), dtype, device, len(texts)
        self._folder = folder
        self.token_ids, self.segment_ids = encode(self.teacher.tokenizer, texts, None, MAX_LENGTH)
        self._specs = tuple(
            array_spec(signal, CLASSES if signal == LOGITS else self.teacher.hidden_size)
            for signal in parse_signals(signals, self.teacher.num_layers)
        )
        self._layout = StoreLayout.for_vocabulary(VOCABULARY, batch_tokens=BATCH_TOKENS)
        self._identity = StoreIdentity(teacher=self.teacher.identity(), tokenizer={}, capture={"dtype": dtype})
        with self._opened() as (store, job):
            self._shards = [store.read_tokens(shard) for shard in range(store.catalogue().num_shards)]
            self.runner = job.runner({spec.signal: spec.dtype for spec in self._specs})

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        from kd.pipeline.store import create_or_open
        from kd.stages.cache_teacher.capture import CaptureJob

        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            store = create_or_open(Path(name) / "store", self._identity, self._layout)
            store.allocate(self.token_ids, self.segment_ids)
            store.declare(self._specs)
            yield (
                store,
                CaptureJob(
                    store=store,
                    teacher=str(self.teacher.folder),
                    trust_remote_code=False,
                    tensors=self.teacher.tensor_digest,
                    dtype=self.dtype,
                    device=self.device,
                    specs=self._specs,
                ),
            )

    def kd(self) -> Timed:
        """Every shard computed, written and committed."""
        from kd.pipeline.executor import map_shards

        with self._opened() as (_, job):
            shards = range(len(self._shards))
            started = time.perf_counter()
            assert all(outcome.record for outcome in map_shards(job, shards, name="bench"))
            seconds = time.perf_counter() - started
        return Timed(seconds)

    def no_store(self) -> Timed:
        """The same batches, and nothing kept."""
        from kd.stages.cache_teacher.runner import plan_batches

        started = time.perf_counter()
        for shard in self._shards:
            batches = plan_batches(shard.token_ids.lengths, self._layout.batch_tokens)
            for _ in self.runner.run(shard.token_ids, shard.segment_ids, batches):
                pass
        return Timed(time.perf_counter() - started)

    def stored_logits(self, count: int) -> tuple[Any, np.ndarray]:
        """(token ids of some rows, their logits float32 [count, C] as a store holds them)."""
        from kd.pipeline.executor import map_shards

        with self._opened() as (store, job):
            list(map_shards(job, [0], name="bench"))
            ids = self._shards[0].token_ids.slice(0, count)
            return ids, store.reader().gather(LOGITS, self._shards[0].rows[:count]).astype(np.float32)


def capture_figures(what: str, case: Capture, rounds: int) -> list[Figure]:
    """Rows per second with and without a store, and how busy the device was."""
    shares: list[float] = []

    def watched() -> Timed:
        timed, share = busy_share(case.kd, case.device)
        shares.extend([] if share is None else [share])
        return timed

    seconds = take_turns({"kd": watched, "no store": case.no_store}, rounds)
    found = compared(what, seconds, unit="rows/s", number=lambda s: case.num_rows / s, at_least={"no store": 0.95})
    if shares:
        found.append(Figure(what=what, way="device busy", value=fmean(shares[1:]), unit="% of time"))
    return found


def busy_share(run: Callable[[], Timed], device: str) -> tuple[Timed, float | None]:
    """What `run` gives, and the mean utilisation in percent that nvidia-smi saw meanwhile; None where it cannot."""
    program = shutil.which("nvidia-smi")
    if device == "cpu" or program is None:
        return run(), None
    command = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "50"]
    index = torch.device(device).index or 0
    with subprocess.Popen([*command, "-i", str(index)], stdout=subprocess.PIPE, text=True) as watcher:
        try:
            timed = run()
        finally:
            watcher.terminate()
        seen = [float(line) for line in watcher.communicate()[0].splitlines() if line.strip().isdigit()]
    return timed, fmean(seen) if seen else None


def correctness_figures(case: Capture, count: int = 256) -> list[Figure]:
    """How far logits as stored are from float32 on the processor."""
    ids, stored_NC = case.stored_logits(min(count, case.num_rows))
    model = case.teacher.load("float32").to("cpu")
    with torch.inference_mode():
        rows = [model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0] for row in ids]
    case.teacher.unload()
    expected, stored = torch.stack(rows).double(), torch.from_numpy(stored_NC).double()
    log_p, log_q = expected.log_softmax(-1), stored.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    what = f"correctness, logits, {case.dtype}"
    loose = case.dtype == "float32"
    worst = float((expected - stored).abs().max())
    return [
        # TF32 and another order of summing: three decimal digits of logits around 1 are to be expected.
        Figure(what=what, way="largest difference", value=worst, unit="", at_most=0.01 if loose else None),
        Figure(what=what, way="largest KL", value=float(kl.max()), unit="nats"),
        Figure(
            what=what,
            way="same label",
            value=100 * float((expected.argmax(-1) == stored.argmax(-1)).double().mean()),
            unit="% of rows",
        ),
    ]


# --- read --------------------------------------------------------------------------------------------------------


def read_figures(store: Any, device: str, batch_size: int, rounds: int) -> list[Figure]:
    """Bytes per second of token states into pinned memory, and from there to the device."""
    rows = store_rows(store, (TOKENS,))
    assert rows.stored is not None
    reader, numbers = rows.stored.readers[0], rows.stored.rows[0]
    lengths = rows.tokens.lengths
    pinned = torch.empty(batch_size * int(lengths.max()) * 384, dtype=torch.float16, pin_memory=device != "cpu")
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    batches = [shuffled[i : i + batch_size] for i in range(0, len(numbers) - batch_size + 1, batch_size)][:200]
    total = sum(len(batch) * int(lengths[batch].max()) * 384 * 2 for batch in batches)

    def gather(*, copy: bool) -> None:
        for batch in batches:
            values, _ = reader.gather_tokens(TOKENS, numbers[batch], out=pinned.numpy())
            if copy:
                pinned[: values.size].to(device, non_blocking=True)
                if device != "cpu":
                    torch.cuda.synchronize()  # the next batch comes into the same memory

    def copy_alone() -> None:
        for batch in batches:
            size = len(batch) * int(lengths[batch].max()) * 384
            (pinned[:size].clone() if device == "cpu" else pinned[:size].to(device, non_blocking=True))
        if device != "cpu":
            torch.cuda.synchronize()

    ways = {
        "gathered and copied": partial(gather, copy=True),
        "gathered": partial(gather, copy=False),
        "copied": copy_alone,
    }
    seconds = take_turns(ways, rounds)
    return compared("read, padded hidden.tok", seconds, unit="GB/s", number=lambda s: total / s / 1e9)


# --- a teacher and texts -----------------------------------------------------------------------------------------


def make_teacher(folder: Path, layers: int) -> Path:
    """A folder with a classifier of BERT-base width and random weights, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_labels=CLASSES)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        # The head that transformers draws gives logits near 0, which tell nothing.
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    words = [*SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    ).save_pretrained(folder)
    return folder


def make_texts(count: int) -> list[str]:
    """Texts of made-up words with the lengths of SST-2."""
    rng = np.random.default_rng(1)
    return [
        " ".join(f"w{number}" for number in rng.integers(VOCABULARY - len(SPECIAL), size=length - 2).tolist())
        for length in sst2_lengths(count).tolist()
    ]


if __name__ == "__main__":
    main()
