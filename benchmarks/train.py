"""How fast a student trains from the store: against the same steps in memory, plain loops, and a live teacher.

    python benchmarks/train.py [--quick] [--only step epoch resume] [--rows 20000] [--steps 5] [--rounds 24]

- step: optimiser steps of a BiLSTM (2 x 150 over 30,522 x 300 embeddings) with logits as targets, with token states of
  one layer as well, and in bfloat16. `kd` gathers every batch from the store's files. `in memory` is the same trainer
  over batches that were gathered before. `bare loop` is forward, loss, backward, clip and step over those and nothing
  else. `Trainer` is transformers' own over a list of rows in memory with its usual collator: rows in random order,
  padded to the longest of each batch, the whole embedding table trained. `reader wait` is kd's time without a batch.
  Each way is a process that trains on and on; they take turns of a few steps, and ratios are of the same batches.
- epoch: the same rows with logits that a teacher of BERT-base size gives while the student trains, in evaluation and
  inference mode, against logits from the store. A few steps are measured on the same batches, and scaled to an epoch
  of 67,349 rows (SST-2).
- resume: from a known order to the first batch after a checkpoint in mid-epoch, and all that comes before the first
  step: opening the store, the lengths of its rows, the token ids that occur.

The store is made up in a temporary folder; lengths are drawn like those of SST-2 in word pieces (3 to 66, mean 13.5).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from relay import Baton, Relay
from report import Figure, Timed, compared, finish, take_turns

from kd.pipeline.ragged import Ragged
from kd.pipeline.store import Signal, StoreIdentity, StoreLayout, TeacherStore, array_spec, create_or_open
from kd.stages.train_student.loader import BatchLoader
from kd.stages.train_student.order import BatchOrder
from kd.stages.train_student.rows import Rows, StoredTokens, StoreRows

VOCABULARY, CLASSES, TEACHER_WIDTH, TEACHER_LAYERS = 30522, 2, 384, 6
EPOCH_ROWS = 67_349
PARTS = ("step", "epoch", "resume")
LOGITS, TOKENS = Signal("logits"), Signal("hidden.tok", TEACHER_LAYERS)
STEP_TARGETS = {"in memory": 1 / 1.03, "bare loop": 1 / 1.15}
LIVE_TARGETS = {"live float32": 20.0, "live bfloat16": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and steps: about a minute")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--rows", type=int, help="in the store of the steps (default 20,000; 8,000 if quick)")
    parser.add_argument("--steps", type=int, help="timed steps of each way and round (default 5)")
    parser.add_argument("--live-steps", type=int, help="those with a live teacher (default 6; 1 if quick)")
    parser.add_argument("--resume-rows", type=int, help="default 1,000,000; 100,000 if quick")
    parser.add_argument("--rounds", type=int, help="timed rounds of steps, after a warm-up (default 24; 3 if quick)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--teacher-layers", type=int, default=12, help="of the live teacher; BERT-base has 12")
    options = parser.parse_args()
    quick = options.quick
    steps = options.steps or 5
    live_steps, live_rounds = options.live_steps or (1 if quick else 6), 1 if quick else 2
    rounds = options.rounds or (3 if quick else 24)

    quiet_transformers()
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        lengths = sst2_lengths(options.rows or (8_000 if quick else 20_000))
        store = make_store(Path(folder) / "store", lengths, [LOGITS] if quick else [LOGITS, TOKENS])
        bench = partial(Workbench, store, folder=Path(folder), batch_size=options.batch_size)
        if "step" in options.only:
            of_steps = partial(bench, steps=rounds * steps, warm_up=3 if quick else 8)
            cases = {"step, logits": of_steps}
            if not quick:
                cases["step, logits, bf16"] = partial(of_steps, autocast="bf16")
                cases["step, logits and hidden.tok"] = partial(of_steps, signals=(LOGITS, TOKENS))
            with Relay(4, imports=("transformers.trainer", "kd.stages.train_student.trainer")) as relay:
                for name, case in cases.items():
                    figures += step_figures(name, case, relay, rounds, with_trainer=name == "step, logits")
            millions = of_steps().num_trainable / 1e6
            notes.append(f"{millions:.2f} M trainable: kd leaves out embeddings that no training row reaches.")
        if "epoch" in options.only:
            for student in ["bilstm"] if quick else ["bilstm", "bert"]:
                case = bench(student=student, steps=live_steps, warm_up=1, teacher_layers=options.teacher_layers)
                figures += live_figures(f"epoch, {student}", case, live_rounds)
            notes.append(f"Epochs of {EPOCH_ROWS:,} rows, scaled from {live_steps} steps of {options.batch_size} rows.")
        if "resume" in options.only:
            num_rows = options.resume_rows or (100_000 if quick else 1_000_000)
            figures += resume_figures(Path(folder) / "large", num_rows)
    settings = {**vars(options), "steps": steps, "rounds": rounds, "live_steps": live_steps}
    finish("train", figures, settings, notes=notes)


def step_figures(
    what: str, case: Callable[[], Workbench], relay: Relay, rounds: int, *, with_trainer: bool = False
) -> list[Figure]:
    """Rows per second of each way, and the share of kd's time that it waits for batches.

    Args:
        case: makes the workbench, in the process of each way; its steps are shared out evenly among the rounds.
    """
    bench = case()
    ways = {"kd": "kd", "in memory": "in_memory"}
    if bench.autocast != "fp16":  # which needs its loss scaled
        ways["bare loop"] = "bare_loop"
    if with_trainer:
        ways["Trainer"] = "huggingface"
    runs = {name: partial(run_way, case, method) for name, method in ways.items()}
    steps = bench.steps // rounds
    seconds, returned = relay.run(runs, rounds=rounds, steps=steps, warm_up=bench.warm_up)
    num_rows = steps * bench.order.rows_per_step
    figures = compared(what, seconds, unit="rows/s", number=lambda s: num_rows / s, at_least=STEP_TARGETS)
    share = 100 * returned["kd"] / sum(seconds["kd"])
    return [*figures, Figure(what=what, way="reader wait", value=share, unit="% of time", at_most=3.0)]


def run_way(case: Callable[[], Workbench], method: str, baton: Baton) -> Any:
    """One way of a workbench, in this process."""
    quiet_transformers()
    bench = case()
    baton.now = bench.now
    return getattr(bench, method)(baton.step_ended)


def live_figures(what: str, case: Workbench, rounds: int) -> list[Figure]:
    """Seconds per epoch from the store and with the teacher live."""
    ways = {"kd": case.kd, **{f"live {dtype}": partial(case.live, dtype) for dtype in ("float32", "bfloat16")}}
    per_epoch = EPOCH_ROWS / (case.steps * case.order.rows_per_step)
    targets = LIVE_TARGETS if case.student == "bilstm" else {}
    # Every turn has a warm-up of its own; a round of them is for more than one round to compare.
    seconds = take_turns({name: partial(case.timed, way) for name, way in ways.items()}, rounds, warm_up=rounds > 1)
    return compared(what, seconds, unit="s/epoch", number=lambda s: s * per_epoch, at_least=targets)


def resume_figures(folder: Path, num_rows: int) -> list[Figure]:
    """Seconds to the first batch after a checkpoint in mid-epoch."""
    store = make_store(folder, sst2_lengths(num_rows), [LOGITS])
    started = time.perf_counter()
    rows = store_rows(store, (LOGITS,))
    opened = time.perf_counter()
    index = np.arange(len(rows), dtype=np.int32)  # some short rows are alike, and then one
    rows.seen_tokens(index, VOCABULARY)
    seen = time.perf_counter()
    order = BatchOrder(index, rows.tokens.lengths, batch_size=128, seed=1)
    middle = order.steps_per_epoch // 2
    times = []
    for epoch in (1, 2, 3):
        begun = time.perf_counter()
        loader = BatchLoader(rows, order, first_step=epoch * order.steps_per_epoch + middle)
        loader.set_epoch(epoch)
        batches = iter(loader)
        batch = next(batches)
        times.append(time.perf_counter() - begun)
        batches.close()
        expected = rows.batch(next(islice(order.batches(epoch), middle, None)))
        assert torch.equal(batch["inputs"]["input_ids"], expected["inputs"]["input_ids"]), "not the next batch"
    what = f"resume, {num_rows:,} rows"
    return [
        Figure(what=what, way="first batch", value=statistics.median(times), unit="s", at_most=1.0),
        Figure(what=what, way="store and lengths", value=opened - started, unit="s"),
        Figure(what=what, way="token ids that occur", value=seen - opened, unit="s"),
    ]


class Workbench:
    """One student with one method over a store, and the ways to train it.

    Args:
        store: what `make_store` made.
        folder: for the trainers' output.
        steps: that are timed.
        warm_up: steps before them.
        batch_size: rows per step.
        signals: targets: logits, with or without token states.
        student: "bilstm", or "bert" (4 layers, 312 wide).
        autocast: "bf16" or "fp16", or nothing.
        device: on which it trains.
        teacher_layers: of the live teacher.
    """

    def __init__(
        self,
        store: TeacherStore,
        *,
        folder: Path,
        steps: int,
        batch_size: int,
        warm_up: int = 8,
        signals: tuple[Signal, ...] = (LOGITS,),
        student: str = "bilstm",
        autocast: str = "",
        device: str = "cpu",
        teacher_layers: int = 12,
    ) -> None:
        self.steps, self.warm_up, self.student, self.autocast, self.device = steps, warm_up, student, autocast, device
        self._folder, self._teacher_layers = folder, teacher_layers
        self.rows = store_rows(store, signals)
        index = np.arange(len(self.rows), dtype=np.int32)
        self.order = BatchOrder(index, self.rows.tokens.lengths, batch_size=batch_size, seed=1)
        self._seen = self.rows.seen_tokens(index, VOCABULARY)
        self._signals = signals

    @property
    def num_trainable(self) -> int:
        """Parameters that the optimiser moves."""
        return sum(p.numel() for p in self._distillation().parameters() if p.requires_grad)

    # --- ways ----------------------------------------------------------------------------------------------------

    def kd(self, step_ended: Callable[[], None]) -> float:
        """From the store; returns the seconds that the timed steps waited for batches."""
        return self._train(self.rows, step_ended)

    def in_memory(self, step_ended: Callable[[], None]) -> None:
        """The same trainer over batches that were gathered before."""
        self._train(Given(self._batches), step_ended)

    def live(self, dtype: str, step_ended: Callable[[], None]) -> None:
        """The same trainer, the logits of every batch from a teacher that runs when the batch is asked for."""
        teacher = live_teacher(dtype, self.device, self._teacher_layers)
        self._train(Given(map(partial(answered, teacher, self.device), self._batches)), step_ended, threads=0)

    def bare_loop(self, step_ended: Callable[[], None]) -> None:
        """What a step cannot do without, over batches that were gathered before."""
        model = self._distillation().to(self.device).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (self.warm_up + self.steps))
        for batch in self._batches:
            batch = moved(batch, self.device)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast == "bf16"):
                loss = model(**batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step_ended()

    def huggingface(self, step_ended: Callable[[], None]) -> None:
        """transformers' own `Trainer` over a list of rows."""
        from transformers import DataCollatorWithPadding, PrinterCallback, Trainer

        class Distiller(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                teacher = inputs.pop("teacher_logits")
                logits = model(**inputs).logits.float()
                return torch.nn.functional.kl_div(
                    logits.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
                )

        torch.manual_seed(0)
        trainer = Distiller(
            model=student_model(self.student),
            args=self._arguments(threads=0),
            train_dataset=self._plain_rows,
            data_collator=DataCollatorWithPadding(pad_only_tokenizer()),
            callbacks=[after_each_step(step_ended)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def timed(self, way: Callable[[Callable[[], None]], Any]) -> Timed:
        """Seconds of the steps after the warm-up of one way."""
        times: list[float] = []
        way(lambda: times.append(self.now()))
        return Timed(times[-1] - times[self.warm_up - 1])

    def now(self) -> float:
        """The time when the device has done what it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    # --- what they are made of -----------------------------------------------------------------------------------

    def _train(self, rows: Any, step_ended: Callable[[], None], threads: int = 1) -> float:
        from transformers import PrinterCallback

        from kd.stages.train_student.trainer import StudentTrainer

        waited: list[float] = []

        def ended() -> None:
            waited.append(trainer.loader.wait_s)
            step_ended()

        trainer = StudentTrainer(
            model=self._distillation(),
            args=self._arguments(threads),
            rows=rows,
            order=self.order,
            callbacks=[after_each_step(ended)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return waited[-1] - waited[self.warm_up - 1]

    def _arguments(self, threads: int) -> Any:
        from transformers import TrainingArguments

        return TrainingArguments(
            output_dir=str(self._folder / "run"),
            max_steps=self.warm_up + self.steps,
            per_device_train_batch_size=self.order.batch_size,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            bf16=self.autocast == "bf16",
            fp16=self.autocast == "fp16",
            use_cpu=self.device == "cpu",
            save_strategy="no",
            logging_steps=0.02,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=threads,
            dataloader_pin_memory=self.device != "cpu",
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
        )

    def _distillation(self) -> Any:
        from kd.stages.train_student.methods import Shapes, parse_methods
        from kd.stages.train_student.seen_rows import SeenRows
        from kd.stages.train_student.students import parse_student
        from kd.stages.train_student.trainer import Distillation

        torch.manual_seed(0)
        model = student_model(self.student)
        if len(self._seen) <= 0.8 * VOCABULARY:
            model.set_input_embeddings(SeenRows(model.get_input_embeddings(), self._seen))
        method = "soft-target" if TOKENS not in self._signals else "soft-target,fitnets:layer_map=1-6"
        shapes = Shapes(
            task="single-label",
            num_labels=CLASSES,
            token_widths=(300, 300),
            sentence_widths=(300, 300),
            teacher_layers=TEACHER_LAYERS,
            teacher_width=TEACHER_WIDTH,
        )
        return Distillation(model, parse_student(self.student), parse_methods(method), shapes)

    @cached_property
    def _batches(self) -> list[Any]:
        return [self.rows.batch(index) for index in islice(self._order(), self.warm_up + self.steps)]

    def _order(self) -> Iterator[np.ndarray]:
        epoch = 0
        while True:
            yield from self.order.batches(epoch)
            epoch += 1

    @cached_property
    def _plain_rows(self) -> list[dict[str, Any]]:
        found = []
        for batch in self._batches:
            ids, masks = (batch["inputs"][name].tolist() for name in ("input_ids", "attention_mask"))
            for row, mask, logits in zip(ids, masks, batch["signals"]["logits"].tolist(), strict=True):
                found.append({"input_ids": row[: sum(mask)], "teacher_logits": logits})
        return found


class Given:
    """Rows whose batches come one after another, as training asks for them."""

    def __init__(self, batches: Any) -> None:
        self._batches = iter(batches)

    def __len__(self) -> int:
        return 1

    def batch(self, *_: Any, **__: Any) -> Any:
        return next(self._batches, None)


def answered(teacher: Any, device: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with logits that the teacher gives now."""
    inputs = moved(batch["inputs"], device)
    with torch.inference_mode():
        logits = teacher(**inputs).logits.float()
    # What inference mode made cannot take part in a loss.
    return {**batch, "inputs": inputs, "signals": {"logits": logits.clone()}}


def moved(batch: Any, device: str) -> Any:
    """The tensors of a batch on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return {name: moved(value, device) for name, value in batch.items()}


def after_each_step(call: Callable[[], None]) -> Any:
    """A callback of `Trainer`."""
    from transformers import TrainerCallback

    class AfterEachStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            call()

    return AfterEachStep()


def student_model(name: str) -> Any:
    """A student with random weights."""
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=312,
            num_hidden_layers=4,
            num_attention_heads=12,
            intermediate_size=1200,
            num_labels=CLASSES,
        )
        return BertForSequenceClassification(config)
    from kd.stages.train_student.bilstm_model import BiLstmConfig, BiLstmForSequenceClassification

    return BiLstmForSequenceClassification(BiLstmConfig(vocab_size=VOCABULARY, num_labels=CLASSES))


@cache
def live_teacher(dtype: str, device: str, layers: int) -> Any:
    """A teacher of the width of BERT-base with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, num_hidden_layers=layers)
    return BertForSequenceClassification(config).to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def pad_only_tokenizer() -> Any:
    """What transformers' collator pads with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]")


def store_rows(store: TeacherStore, signals: tuple[Signal, ...]) -> Rows:
    """All rows of a store, to train on."""
    catalogue = store.catalogue()
    numbers = [np.arange(r.rows) + r.shard * store.layout.rows_per_shard for r in catalogue.allocations]
    stored = StoreRows([store.reader()], [np.concatenate(numbers)])
    count = len(stored)
    return Rows(
        tokens=StoredTokens(stored),
        labels=np.zeros(count, np.int64),
        has_gold=np.zeros(count, bool),
        pad_token_id=0,
        stored=stored,
        signals=signals,
    )


def sst2_lengths(num_rows: int) -> np.ndarray:
    """Lengths as those of SST-2 in word pieces: 3 to 66, mean 13.5."""
    drawn = np.random.default_rng(0).lognormal(2.2, 0.7, num_rows)
    return np.clip(np.rint(drawn).astype(np.int64) + 2, 3, 66)


def make_store(folder: Path, lengths: np.ndarray, signals: list[Signal]) -> TeacherStore:
    """A store of random words, a few of them frequent, and of random signals."""
    rng = np.random.default_rng(0)
    words = np.minimum(rng.zipf(1.2, int(lengths.sum())) + 998, VOCABULARY - 1)
    identity = StoreIdentity(teacher={"made": "up"}, tokenizer={}, capture={})
    store = create_or_open(folder, identity, StoreLayout.for_vocabulary(VOCABULARY))
    allocation = store.allocate(Ragged.from_lengths(words, lengths))
    specs = [array_spec(signal, CLASSES if signal == LOGITS else TEACHER_WIDTH) for signal in signals]
    store.declare(specs)
    for shard in allocation.shards:
        ids = store.read_tokens(shard).token_ids
        writer = store.writer(shard, specs)
        for spec in specs:
            entries = len(ids.values) if spec.axis == "token" else len(ids)
            values = rng.standard_normal((entries, *spec.shape), dtype=np.float32)
            (writer.put_tokens if spec.axis == "token" else writer.put_rows)(spec.signal, np.arange(len(ids)), values)
        writer.commit()
    return store


def quiet_transformers() -> None:
    """Only errors on stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
