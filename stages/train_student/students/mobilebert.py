"""Student `mobilebert`: transformers' MobileBERT, thin and deep with bottlenecks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....pipeline.errors import UsageError
from .base import Build, Start, Student, Task, TeacherFacts, first_token_outputs, students
from .bert import copy_into
from .starts import fitted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..methods.base import StudentOutputs


@students.register("mobilebert")
@dataclass(frozen=True, kw_only=True)
class MobileBert(Student):
    """MobileBERT over the teacher's tokens: blocks of width `hidden_size` that work at width `bottleneck_size` inside.

    Options: `hidden_size` 0 takes the teacher's width, so that methods compare block boundaries without a projection;
    `embedding_size` is that of the word table, which a trigram convolution widens; `normalization` is `no_norm` as in
    the paper (an elementwise scale and shift: fast, made for layer-wise transfer) or `layer_norm`, which trains from
    scratch more steadily. Its activations outgrow float16: train in float32 or bfloat16.

    Starts: `embeddings` reduces the teacher's word table to its leading directions at width `embedding_size`.
    """

    source = "Sun et al., MobileBERT: a Compact Task-Agnostic BERT, arXiv 2004.02984"
    starts: ClassVar[tuple[str, ...]] = ("embeddings", "random")
    general: ClassVar[bool] = True
    training: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 5,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
    }

    num_layers: int = 4
    hidden_size: int = 0
    bottleneck_size: int = 128
    embedding_size: int = 128
    heads: int = 4
    intermediate_size: int = 0
    num_ffn: int = 2
    normalization: Literal["layer_norm", "no_norm"] = "layer_norm"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.require_sizes(hidden_size=0, intermediate_size=0, num_layers=1, bottleneck_size=1, embedding_size=1)
        self.require_sizes(heads=1, num_ffn=1)

    @property
    def refuses_float16(self) -> bool:
        return True

    def check(self, start: Start, teacher: TeacherFacts, task: Task) -> None:
        super().check(start, teacher, task)
        if self.bottleneck_size % self.heads:
            raise UsageError(
                f"student 'mobilebert' works at width {self.bottleneck_size}, which {self.heads} heads do not divide"
            )
        if start.kind == "embeddings" and self.embedding_size > teacher.hidden_size:
            raise UsageError(
                f"option 'embedding_size' of student 'mobilebert' is {self.embedding_size}, and the teacher's word "
                f"table has width {teacher.hidden_size}",
                fix=f"ask for at most {teacher.hidden_size}, or --init random",
            )

    def widths(self, start: Start, teacher: TeacherFacts, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
        widths = (self.hidden_size or teacher.hidden_size,) * (self.num_layers + 1)
        return widths, widths

    def attention(self, start: Start, teacher: TeacherFacts) -> tuple[int, int]:
        return self.heads, self.bottleneck_size

    def build(self, start: Start, teacher: TeacherFacts, task: Task, tokenizer: PreTrainedTokenizerBase) -> Build:
        from transformers import MobileBertConfig

        width = self.hidden_size or teacher.hidden_size
        config = MobileBertConfig(
            vocab_size=teacher.vocab_size,
            hidden_size=width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size or width,
            embedding_size=self.embedding_size,
            intra_bottleneck_size=self.bottleneck_size,
            num_feedforward_networks=self.num_ffn,
            normalization_type=self.normalization,
            max_position_embeddings=max(teacher.max_tokens, int(teacher.config.get("max_position_embeddings", 0))),
            type_vocab_size=max(2, int(teacher.config.get("type_vocab_size", 2))),
            pad_token_id=tokenizer.pad_token_id or 0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=self.dropout,
            classifier_dropout=self.dropout,
            **task.config_fields(),
        )
        model = task.auto_class.from_config(config)
        if start.kind == "random":
            return Build(model)
        table_VD = fitted(teacher.word_table(), self.embedding_size, what="the teacher's word table")
        # The trigram input of the last token sees one padded neighbour or none: zeros make them the same.
        table_VD[config.pad_token_id] = 0.0
        return Build(model, {"tensors_from_teacher": copy_into(model, {"embeddings.word_embeddings.weight": table_VD})})

    def watch(self, model_output: Any, mask_BT: Tensor) -> StudentOutputs:
        return first_token_outputs(model_output, mask_BT)
