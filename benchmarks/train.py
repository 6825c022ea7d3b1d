"""How fast a student trains from the store, beside the same steps on tensors in memory and beside a bare PyTorch loop.

    python benchmarks/train.py [--rows 8000] [--steps 120] [--batch-size 64] [--signals logits] [--bf16] [--repeats 3]

Three ways over the same rows in the same batches with the same BiLSTM, taken in turn so that a machine that slows down
slows all of them:

- store: what kd train-student does: every batch gathered from the store's files by row number;
- memory: the same trainer over batches that were gathered before;
- bare loop: forward, loss, backward, clip and step over those batches, and nothing else.

Prints one table and one JSON line. Ratios of medians; design targets are 0.87 of the bare loop and a reader wait of at
most 3 % of the step. The store is made up in a temporary folder: lengths and words as in short questions.
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

import numpy as np

VOCABULARY, CLASSES, WIDTH = 30522, 77, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=120, help="timed steps of each way and repeat")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--signals", choices=("logits", "tokens"), default="logits", help="tokens adds hidden.tok@6")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        ways = {"store": bench.store, "memory": bench.memory, "bare loop": bench.bare_loop}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                rates[name].append(way())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    wait = statistics.median(bench.waits)
    print(
        f"{arguments.rows} rows, {bench.trainable / 1e6:.1f} M trainable parameters, {torch.get_num_threads()} threads"
    )
    for name, rate in medians.items():
        print(f"  {name:10} {rate:9.0f} rows/s   (min {min(rates[name]):.0f}, max {max(rates[name]):.0f})")
    ratios = {
        "store / memory": medians["store"] / medians["memory"],
        "store / bare loop": medians["store"] / medians["bare loop"],
    }
    print(f"  store / memory    {ratios['store / memory']:6.3f}")
    print(f"  store / bare loop {ratios['store / bare loop']:6.3f}   target 0.87")
    print(f"  reader wait       {wait:6.1%}   target 3.0%")
    print(
        json.dumps(
            {
                "benchmark": "train",
                "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
                "reader_wait_share": round(wait, 5),
                "rows_per_s": {name: round(rate, 1) for name, rate in medians.items()},
                "settings": vars(arguments),
                "threads": torch.get_num_threads(),
                "machine": f"{platform.machine()} {os.cpu_count()} cores",
                "torch": torch.__version__,
            }
        )
    )


class Bench:
    """One made-up store, and three ways to train on it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from kd.pipeline.store import Signal
        from kd.stages.train_student.methods import Shapes, parse_methods
        from kd.stages.train_student.order import BatchOrder
        from kd.stages.train_student.rows import Rows, StoredTokens, StoreRows

        self.arguments, self.folder = arguments, folder
        self.signals = (Signal("logits"), *([Signal("hidden.tok", 6)] if arguments.signals == "tokens" else []))
        store_rows = StoreRows(*_make_store(folder / "store", arguments.rows, self.signals))
        self.rows = Rows(
            tokens=StoredTokens(store_rows),
            labels=np.zeros(arguments.rows, np.int64),
            has_gold=np.zeros(arguments.rows, bool),
            pad_token_id=0,
            stored=store_rows,
            signals=self.signals,
        )
        self.order = BatchOrder(
            rows=np.arange(arguments.rows), lengths=self.rows.tokens.lengths, batch_size=arguments.batch_size, seed=1
        )
        self.seen = self.rows.seen_tokens(np.arange(arguments.rows), VOCABULARY)
        spec = "soft-target" if arguments.signals == "logits" else "soft-target,fitnets:layer_map=1-6"
        self.terms = parse_methods(spec)
        self.shapes = Shapes(
            task="single-label",
            num_labels=CLASSES,
            token_widths=(WIDTH, 300),
            sentence_widths=(WIDTH, 300),
            teacher_layers=6,
            teacher_width=WIDTH,
        )
        self.num_steps = arguments.warm_up + arguments.steps
        self.waits: list[float] = []
        self.trainable = sum(p.numel() for p in self._model().parameters() if p.requires_grad)

    def store(self) -> float:
        """Rows per second from the store."""
        trainer, rate = self._train(self.rows)
        self.waits.append(trainer.loader.wait_s / (trainer.loader.wait_s + trainer.clock.step_s))
        return rate

    def memory(self) -> float:
        """Rows per second from batches gathered before."""
        return self._train(_Gathered(self.rows, self._batches()))[1]

    def bare_loop(self) -> float:
        """Rows per second of a plain loop over the same batches."""
        import torch

        batches = self._batches()
        model = self._model().train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.num_steps)
        started = 0.0
        for step, batch in enumerate(batches):
            if step == self.arguments.warm_up:
                started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bf16):
                loss = model(**batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return self.arguments.steps * self.order.rows_per_step / (time.perf_counter() - started)

    def _model(self) -> Any:
        import torch

        from kd.stages.train_student.bilstm_model import BiLstmConfig, BiLstmForSequenceClassification
        from kd.stages.train_student.seen_rows import SeenRows
        from kd.stages.train_student.students import parse_student
        from kd.stages.train_student.trainer import Distillation

        torch.manual_seed(0)
        config = BiLstmConfig(vocab_size=VOCABULARY, embedding_size=WIDTH, num_labels=CLASSES)
        student = BiLstmForSequenceClassification(config)
        student.set_input_embeddings(SeenRows(student.get_input_embeddings(), self.seen))
        return Distillation(student, parse_student("bilstm"), self.terms, self.shapes)

    def _train(self, rows: Any) -> tuple[Any, float]:
        from transformers import PrinterCallback, TrainerCallback, TrainingArguments

        from kd.stages.train_student.trainer import StudentTrainer

        class Stamps(TrainerCallback):
            def __init__(self) -> None:
                self.times: list[float] = []

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.times.append(time.perf_counter())

        stamps = Stamps()
        args = TrainingArguments(
            output_dir=str(self.folder / "run"),
            max_steps=self.num_steps,
            per_device_train_batch_size=self.arguments.batch_size,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            bf16=self.arguments.bf16,
            use_cpu=True,
            save_strategy="no",
            logging_steps=0.02,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=1,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
        )
        trainer = StudentTrainer(model=self._model(), args=args, rows=rows, order=self.order, callbacks=[stamps])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = stamps.times[-1] - stamps.times[self.arguments.warm_up - 1]
        return trainer, self.arguments.steps * self.order.rows_per_step / seconds

    def _batches(self) -> list[Any]:
        found: list[Any] = []
        epoch = 0
        while len(found) < self.num_steps:
            found += [self.rows.batch(index) for index in self.order.batches(epoch)]
            epoch += 1
        return found[: self.num_steps]


class _Gathered:
    """Rows whose batches are there already, in the order in which training asks for them."""

    def __init__(self, rows: Any, batches: list[Any]) -> None:
        self.rows, self._batches = rows, iter(batches)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: np.ndarray) -> Any:
        return next(self._batches, None)


def _make_store(folder: Path, num_rows: int, signals: tuple[Any, ...]) -> tuple[list[Any], list[np.ndarray]]:
    from kd.pipeline.ragged import Ragged
    from kd.pipeline.store import StoreIdentity, StoreLayout, array_spec, create_or_open

    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(5.0, 2.6, num_rows).astype(np.int64) + 4, 4, 64)
    words = np.minimum(generator.zipf(1.2, int(lengths.sum())) + 998, VOCABULARY - 1)
    identity = StoreIdentity(teacher={"made": "up"}, tokenizer={}, capture={})
    store = create_or_open(folder, identity, StoreLayout.for_vocabulary(VOCABULARY))
    allocation = store.allocate(Ragged.from_lengths(words, lengths))
    specs = [array_spec(signal, CLASSES if signal.name == "logits" else WIDTH) for signal in signals]
    store.declare(specs)
    for shard in allocation.shards:
        ids = store.read_tokens(shard).token_ids
        writer = store.writer(shard, specs)
        for spec in specs:
            entries = len(ids.values) if spec.axis == "token" else len(ids)
            values = generator.normal(size=(entries, *spec.shape)).astype(np.float32)
            (writer.put_tokens if spec.axis == "token" else writer.put_rows)(spec.signal, np.arange(len(ids)), values)
        writer.commit()
    return [store.reader()], [allocation.rows]


if __name__ == "__main__":
    main()
