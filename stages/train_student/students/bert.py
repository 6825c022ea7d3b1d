"""Student `bert`: a BERT of any width and depth, from the teacher's embeddings or layers where they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ....pipeline.errors import RefusedError, UsageError
from .base import Build, Start, Student, Task, TeacherFacts, first_token_outputs, students
from .starts import fitted

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..methods.base import StudentOutputs


@students.register("bert")
@dataclass(frozen=True, kw_only=True)
class Bert(Student):
    """BERT with fewer or narrower layers, over the teacher's tokens.

    Options: `hidden_size` 0 takes the teacher's width, `heads` 0 one per 64 features (one per 32 below a width of
    512), `intermediate_size` 0 four times the width, `num_layers` 0 as many as the start names, else 3.

    Starts: `embeddings` copies the teacher's word, position and segment tables and their LayerNorm, the word table
    reduced to its leading directions for a narrower student; `layers:1+3+5` also copies those blocks of a BERT
    teacher, and its pooler and classifier where the store keeps them. For a narrower student embeddings and blocks are
    reduced to the leading directions of the word table, the products of query and key maps and of value and output
    maps head by head by truncated SVD; heads and `intermediate_size` stay the teacher's, pooler and classifier start
    anew.
    """

    source = "Devlin et al., BERT, arXiv 1810.04805; sizes as in Turc et al., Well-Read Students, arXiv 1908.08962"
    starts: ClassVar[tuple[str, ...]] = ("embeddings", "random", "layers")
    general: ClassVar[bool] = True
    training: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 5,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
    }

    num_layers: int = 0
    hidden_size: int = 0
    heads: int = 0
    intermediate_size: int = 0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.require_sizes(num_layers=0, hidden_size=0, heads=0, intermediate_size=0)

    def _num_layers(self, start: Start) -> int:
        return self.num_layers or len(start.layers) or 3

    def _width(self, teacher: TeacherFacts) -> int:
        return self.hidden_size or teacher.hidden_size

    def _heads(self, start: Start, teacher: TeacherFacts) -> int:
        if self.heads:
            return self.heads
        if start.kind == "layers":
            return int(teacher.config["num_attention_heads"])
        width = self._width(teacher)
        return max(1, width // (64 if width >= 512 else 32))

    def check(self, start: Start, teacher: TeacherFacts, task: Task) -> None:
        super().check(start, teacher, task)
        width, heads = self._width(teacher), self._heads(start, teacher)
        if width % heads and start.kind != "layers":
            raise UsageError(f"student 'bert' has width {width}, which {heads} heads do not divide", fix="give heads=N")
        if start.kind == "embeddings" and width > teacher.hidden_size:
            raise UsageError(
                f"student 'bert' has width {width}, and the teacher's embeddings have {teacher.hidden_size}",
                fix="--init random, or a smaller hidden_size",
            )
        if start.kind != "layers":
            return
        from transformers.activations import ACT2FN

        if teacher.config.get("model_type") != "bert":
            raise RefusedError(
                f"--init {start} copies blocks of a BERT, and the teacher is a {teacher.config.get('model_type')}",
                fix="--init embeddings",
            )
        if str(teacher.config.get("hidden_act")) not in ACT2FN:
            raise RefusedError(f"the teacher's activation {teacher.config.get('hidden_act')!r} is not known here")
        teacher_heads = int(teacher.config["num_attention_heads"])
        if heads != teacher_heads:
            raise UsageError(
                f"--init {start} copies attention head by head: {teacher_heads} heads as the teacher, not {heads}",
                fix="leave heads out, or --init embeddings",
            )
        if width > teacher.hidden_size or width % heads:
            nearest = [count for count in (width // heads * heads, (width // heads + 1) * heads) if count]
            widths = " or ".join(str(count) for count in nearest if count <= teacher.hidden_size)
            raise UsageError(
                f"--init {start} reduces the teacher's width {teacher.hidden_size} to one that its {heads} heads "
                f"divide, not to {width}",
                fix=f"hidden_size={widths}" if width < teacher.hidden_size else "leave hidden_size out",
            )
        if self.intermediate_size not in (0, int(teacher.config["intermediate_size"])):
            raise UsageError(
                f"--init {start} needs the teacher's intermediate_size, {teacher.config['intermediate_size']}: behind "
                "an activation nothing can be reduced",
                fix="leave intermediate_size out",
            )
        if max(start.layers) > teacher.num_layers:
            raise UsageError(f"--init {start}: the teacher has layers 1 to {teacher.num_layers}")
        if self.num_layers not in (0, len(start.layers)):
            raise UsageError(f"--init {start} names {len(start.layers)} layers, and num_layers is {self.num_layers}")

    def widths(self, start: Start, teacher: TeacherFacts, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
        widths = (self._width(teacher),) * (self._num_layers(start) + 1)
        return widths, widths

    def attention(self, start: Start, teacher: TeacherFacts) -> tuple[int, int]:
        return self._heads(start, teacher), self._width(teacher)

    def build(self, start: Start, teacher: TeacherFacts, task: Task, tokenizer: PreTrainedTokenizerBase) -> Build:
        from transformers import BertConfig

        width = self._width(teacher)
        copied = start.kind == "layers"
        config = BertConfig(
            vocab_size=teacher.vocab_size,
            hidden_size=width,
            num_hidden_layers=self._num_layers(start),
            num_attention_heads=self._heads(start, teacher),
            intermediate_size=self.intermediate_size
            or (int(teacher.config["intermediate_size"]) if copied else 4 * width),
            hidden_act=str(teacher.config["hidden_act"]) if copied else "gelu",
            max_position_embeddings=max(teacher.max_tokens, int(teacher.config.get("max_position_embeddings", 0))),
            type_vocab_size=max(2, int(teacher.config.get("type_vocab_size", 2))),
            pad_token_id=tokenizer.pad_token_id or 0,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            **task.config_fields(),
        )
        model = task.auto_class.from_config(config)
        if start.kind == "random":
            return Build(model)
        if copied and width < teacher.hidden_size:
            return self._narrowed(model, start, teacher, width)
        return Build(model, {"tensors_from_teacher": copy_into(model, self._start_tensors(start, teacher, width))})

    def _narrowed(self, model: PreTrainedModel, start: Start, teacher: TeacherFacts, width: int) -> Build:
        """The start from blocks of a wider teacher."""
        from .narrowed import Directions, narrowed

        directions = Directions.of(teacher.word_table(), width)
        tensors = _without_prefix(teacher.tensors("embeddings")) | self._blocks(start, teacher)
        reduced = narrowed(tensors, directions, heads=teacher.num_heads)
        facts = {"tensors_from_teacher": copy_into(model, reduced), "table_kept": round(directions.share, 4)}
        return Build(model, facts)

    def _start_tensors(self, start: Start, teacher: TeacherFacts, width: int) -> dict[str, np.ndarray]:
        """Teacher tensors by their names in the student."""
        tensors = {
            name: value
            for name, value in _without_prefix(teacher.tensors("embeddings")).items()
            # Positions and LayerNorm belong to the full width; a reduced table is normalised anew.
            if width == teacher.hidden_size or name == "embeddings.word_embeddings.weight"
        }
        tensors["embeddings.word_embeddings.weight"] = fitted(
            teacher.word_table(), width, what="the teacher's word table"
        )
        if start.kind == "layers":
            tensors |= self._blocks(start, teacher)
            if teacher.store.has_sidecar("head"):
                tensors |= _without_prefix(teacher.tensors("head"))
        return tensors

    def _blocks(self, start: Start, teacher: TeacherFacts) -> dict[str, np.ndarray]:
        """Tensors of the teacher's blocks by their names in the student."""
        blocks = _without_prefix(teacher.tensors("layers"))
        tensors: dict[str, np.ndarray] = {}
        for index, teacher_layer in enumerate(start.layers):
            prefix = f"encoder.layer.{teacher_layer - 1}."
            found = {name: value for name, value in blocks.items() if name.startswith(prefix)}
            if not found:
                raise RefusedError(
                    f"sidecar 'layers' of store {teacher.store.url} has no tensors of layer {teacher_layer}"
                )
            tensors |= {f"encoder.layer.{index}.{name.removeprefix(prefix)}": value for name, value in found.items()}
        return tensors

    def watch(self, model_output: Any, mask_BT: Tensor) -> StudentOutputs:
        return first_token_outputs(model_output, mask_BT)


def _without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {re.sub(r"^(bert|base_model|model)\.", "", name): value for name, value in tensors.items()}


def copy_into(model: PreTrainedModel, tensors: Mapping[str, np.ndarray]) -> int:
    """Copy tensors into the parameters of a model that have their name, after its base prefix.

    Embeddings and heads of another shape (more positions, another task) are left as they are.

    Returns:
        How many were copied.

    Raises:
        RefusedError: a tensor of a block has another shape than the student's.
    """
    import torch

    prefix = model.base_model_prefix + "."
    copied = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = tensors.get(name.removeprefix(prefix))
            if value is None:
                continue
            if value.shape == tuple(parameter.shape):
                parameter.copy_(torch.from_numpy(value))
                copied += 1
            elif name.startswith(prefix + "encoder."):
                raise RefusedError(
                    f"the teacher's {name.removeprefix(prefix)} has shape {value.shape}, the student's "
                    f"{tuple(parameter.shape)}",
                    fix="--init embeddings",
                )
    return copied
