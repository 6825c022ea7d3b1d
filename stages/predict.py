"""Predictions of a finished model: a teacher folder, a run, or any classifier of texts or of tokens in transformers.

Dimension key: N examples, C classes (1 for regression), W words of all examples, B rows of a batch, T padded length.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..pipeline.artifact import read_manifest
from ..pipeline.errors import RefusedError, near_match
from ..pipeline.ragged import Ragged, ranges
from ..pipeline.stage import UNFINISHED, NullProgress, Progress
from .cache_teacher.teacher import OF_TOKENS, TASK_OF_PROBLEM, max_positions, resolve_device
from .words import encode_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_KINDS = ("teacher", "run")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
WITHOUT_LIMIT = 1_000_000
"""transformers writes an absurdly large `model_max_length` where a tokenizer has no limit."""
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Predictor:
    """A model with its tokenizer, in evaluation mode and float32.

    Attributes:
        path: where it was loaded from.
        model: the transformers model.
        tokenizer: its tokenizer.
        task: "single-label", "multi-label", "regression" or "token".
        label_names: names of the logits' columns in their order; () for regression.
        max_length: longer inputs are cut here, in tokens.
        content: what its manifest says beyond that; {} for a folder that kd did not make.
    """

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: str
    label_names: tuple[str, ...]
    max_length: int
    content: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    def predict(
        self,
        texts_a: Sequence[str],
        texts_b: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits, float32 [N, C], in the order of the texts.

        Of a token task [W, C]: those of the words `text.split(" ")` of all texts one after another, each at its first
        piece; NaN where a word has none, since it was cut or the tokenizer leaves nothing of it.

        Rows are batched by length, so a row's logits may differ in the last bits from those of a batch of its own.

        Args:
            texts_a: the texts, or the first text of every pair.
            texts_b: the second texts of pairs.
            batch_size: rows per forward pass.
            progress: where to report rows.
        """
        words = None
        if self.task == "token":
            encoded, words = encode_words(self.tokenizer, texts_a, self.max_length)
            encoded = self._wanted(encoded)
        else:
            encoded = self._encode(texts_a, texts_b)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        number = len(lengths) if words is None else len(words.values)
        logits_NC = np.full((number, int(self.model.config.num_labels or 0)), np.nan, np.float32)
        task = (progress or NullProgress()).task("predicting", total=len(lengths))
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = self.tokenizer.pad(
                    {name: [column[row] for row in rows] for name, column in encoded.items()},
                    return_tensors="pt",
                    # Where the first pieces were counted from.
                    padding_side=None if words is None else "right",
                )
                output = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})
                logits = output.logits.float().cpu().numpy()
                if words is None:
                    logits_NC[rows] = logits.reshape(len(rows), -1)
                else:
                    of_word, row, piece = _places(words, rows)
                    logits_NC[of_word] = logits[row, piece]
                task.advance(len(rows))
        task.done()
        return logits_NC

    def seconds_for(self, text_a: str, text_b: str | None = None) -> float:
        """Wall time of one call with one example: from text to logits, tokenising included."""
        start = time.perf_counter()
        with torch.inference_mode():
            encoded = self._encode([text_a], None if text_b is None else [text_b])
            batch = {name: torch.tensor(column, device=self.device) for name, column in encoded.items()}
            self.model(**batch).logits.cpu()
        return time.perf_counter() - start

    @property
    def num_parameters(self) -> int:
        """All parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_embedding_parameters(self) -> int:
        """Those of embedding tables (words, positions, segments): looked up, not multiplied."""
        tables = {
            id(module.weight): module.weight.numel()
            for module in self.model.modules()
            if isinstance(module, torch.nn.Embedding)
        }
        return sum(tables.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight files; of the tensors in memory for a model that lies in no folder."""
        files = [file for pattern in WEIGHT_FILES for file in self.path.glob(pattern)] if self.path.is_dir() else []
        if files:
            return sum(file.stat().st_size for file in files)
        return sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())

    def columns_of(self, names: Sequence[str], *, of: str) -> np.ndarray | None:
        """For every name the index of this model's logit column, int64 [C]; None when they are the same already.

        Two models are compared by label names, never by position.

        Args:
            names: the order wanted.
            of: whose order that is, for the error.

        Raises:
            RefusedError: the two do not have the same names.
        """
        if self.label_names == tuple(names):
            return None
        missing = [name for name in names if name not in self.label_names]
        extra = [name for name in self.label_names if name not in names]
        if missing or extra:
            hint = near_match(missing[0], self.label_names) if missing and len(self.label_names) < 50 else ""
            raise RefusedError(
                f"{self.path} and {of} do not have the same labels{hint}",
                details=[
                    *([f"only in {of}: {_shortened(missing)}"] if missing else []),
                    *([f"only in {self.path}: {_shortened(extra)}"] if extra else []),
                ],
                fix="compare models of one task, or give both the same names in id2label of config.json",
            )
        return np.array([self.label_names.index(name) for name in names])

    def _encode(self, texts_a: Sequence[str], texts_b: Sequence[str] | None) -> dict[str, list[list[int]]]:
        encoded = self.tokenizer(
            list(texts_a), None if texts_b is None else list(texts_b), truncation=True, max_length=self.max_length
        )
        return self._wanted(encoded)

    def _wanted(self, encoded: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        wanted = inspect.signature(self.model.forward).parameters
        return {name: column for name, column in encoded.items() if name in wanted}


def _places(words: Ragged, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(words, rows, pieces)` of the words of some rows that have a piece: which, in which of the rows, and where."""
    chosen = words.take(rows)
    of_word = ranges(words.offsets[rows], chosen.lengths)
    row = np.repeat(np.arange(len(rows)), chosen.lengths)
    has_piece = chosen.values >= 0
    return of_word[has_piece], row[has_piece], chosen.values[has_piece]


def load_predictor(
    path: str | Path, *, device: str | None = None, max_length: int | None = None, finished: bool = True
) -> Predictor:
    """Open a model for prediction.

    Args:
        path: a teacher folder, a run, or a folder or hub id of a fine-tuned classifier.
        device: where to run; a GPU where there is one.
        max_length: cut inputs here; by default where the model was cut in training, else its own limit.
        finished: refuse an artifact that is not; the stage that is making it says False.

    Raises:
        UsageError: no such kind of device.
        RefusedError: nothing there, an unfinished or other kind of artifact, or a model whose head is missing.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    device = resolve_device(device)
    folder = Path(path).expanduser()
    manifest = _manifest_of(path, folder, finished)
    _register_students(folder)
    source = str(folder) if folder.is_dir() else str(path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    auto: Any = transformers.AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if tags_tokens(AutoConfig.from_pretrained(source, trust_remote_code=False)):
            auto = transformers.AutoModelForTokenClassification
        model, report = auto.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    # Half a folder, or one that was edited, can fail anywhere in there.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RefusedError(
            f"model {path} cannot be opened as a classifier",
            details=[first_line[:300]],
            fix=f"give a teacher, a run, or a folder that {auto.__name__}.from_pretrained opens",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise RefusedError(
            f"model {path} lacks {len(missing)} tensors, which would be random",
            details=missing[:8],
            fix="fine-tune it first: kd train-teacher --model ...",
        )
    config = model.config
    task = _task_of(config)
    content = manifest.get("content", {}) if manifest else {}
    names = {int(index): str(name) for index, name in config.id2label.items()}
    if {*names} != {*range(config.num_labels)}:
        raise RefusedError(
            f"model {path}: id2label of its config.json names {len(names)} of {config.num_labels} labels"
        )
    return Predictor(
        path=folder if folder.is_dir() else Path(path),
        model=model.eval().requires_grad_(False).to(device),
        tokenizer=tokenizer,
        task=task,
        label_names=() if task == "regression" else tuple(names[index] for index in range(config.num_labels)),
        max_length=max_length or int(content.get("max_length") or 0) or longest_input(config, tokenizer),
        content=content,
    )


def longest_input(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input in tokens that model and tokenizer take; 512 where neither sets a limit."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < WITHOUT_LIMIT else []
    if (positions := max_positions(config)) is not None:
        limits.append(positions)
    return int(min(limits, default=DEFAULT_LENGTH))


def tags_tokens(config: Any) -> bool:
    """Whether a model of this configuration has logits for every token."""
    return any(name.endswith(OF_TOKENS) for name in config.architectures or ())


def _task_of(config: Any) -> str:
    if tags_tokens(config):
        return "token"
    declared = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if declared not in TASK_OF_PROBLEM:
        raise RefusedError(
            f"unknown problem_type {declared!r} in the model's config.json{near_match(str(declared), TASK_OF_PROBLEM)}"
        )
    return TASK_OF_PROBLEM[declared]


def _manifest_of(path: str | Path, folder: Path, finished: bool) -> Mapping[str, Any] | None:
    if not folder.is_dir():
        if folder.exists() or str(path).startswith((".", "/", "~")):
            raise RefusedError(f"model {path} is not a folder", fix="give a teacher, a run, or a hub id")
        return None
    manifest = read_manifest(folder)
    if manifest is not None and manifest["kind"] not in MODEL_KINDS:
        raise RefusedError(f"{path} is a {manifest['kind']}, not a model", fix="give a teacher or a run")
    if finished and manifest is None and (folder / UNFINISHED).exists():
        raise RefusedError(f"model {path} is not finished", fix="run the stage that makes it again: it resumes")
    if not (folder / "config.json").exists():
        raise RefusedError(
            f"model {path} has no config.json",
            details=[", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "(empty)"],
            fix="give a teacher, a run, or a folder that AutoModelForSequenceClassification.from_pretrained opens",
        )
    return manifest


def _register_students(folder: Path) -> None:
    """Make transformers know kd's own architectures, where the folder holds one."""
    config = folder / "config.json"
    if config.is_file() and b'"kd-' in config.read_bytes():
        from .train_student import bilstm_model  # noqa: F401


def _shortened(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
