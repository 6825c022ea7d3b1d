"""Any sequence-classification or encoder checkpoint as a student, by path or hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ....pipeline.errors import RefusedError
from .base import Build, Start, Student, Task, TeacherFacts, first_token_outputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ..methods.base import StudentOutputs


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Student):
    """A checkpoint that `AutoModelForSequenceClassification` (of text without labels: `AutoModelForMaskedLM` or
    `AutoModel`) opens, with its own tokenizer.

    When that tokenizer behaves as the teacher's, the student reads the teacher's token ids from the store and token
    signals fit; otherwise the texts are tokenised again. A head of another shape is made anew.
    """

    name: ClassVar[str] = "checkpoint"
    training: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 4,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
    }
    starts: ClassVar[tuple[str, ...]] = ("checkpoint",)
    general: ClassVar[bool] = True

    path: str

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Its transformers config.

        Raises:
            RefusedError: nothing there that transformers opens.
        """
        from transformers import AutoConfig

        from .. import bilstm_model  # noqa: F401  (makes AutoConfig know it)

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            return config
        except (OSError, ValueError) as error:
            raise RefusedError(
                f"student {self.path!r} is neither a student's name nor a checkpoint that transformers opens",
                details=[str(error).splitlines()[0]],
                fix="kd students lists the names; a checkpoint is a folder with config.json and weights",
            ) from None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise RefusedError(
                f"student {self.path!r} has no tokenizer that transformers opens", details=[str(error).splitlines()[0]]
            ) from None

    @property
    def refuses_float16(self) -> bool:
        return self.config.model_type == "mobilebert"

    def default_start(self) -> Start:
        return Start("checkpoint")

    def check(self, start: Start, teacher: TeacherFacts, task: Task) -> None:
        super().check(start, teacher, task)
        if not isinstance(getattr(self.config, "num_hidden_layers", None), int):
            raise RefusedError(f"student {self.path!r} ({self.config.model_type}) is no text encoder")
        _ = self.tokenizer

    def reads_teacher_tokens(self, teacher: TeacherFacts) -> bool:
        from ....pipeline.fingerprint import fingerprint
        from ...cache_teacher.identity import tokenizer_identity

        return fingerprint(tokenizer_identity(self.tokenizer)) == fingerprint(teacher.store.identity.tokenizer)

    def widths(self, start: Start, teacher: TeacherFacts, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config = self.config
        if config.model_type == "kd-bilstm":
            token = (config.input_size, *[2 * config.hidden_size] * config.num_hidden_layers)
            return token, tuple((4 if config.pair else 1) * width for width in token)
        widths = (int(config.hidden_size),) * (int(config.num_hidden_layers) + 1)
        return widths, widths

    def attention(self, start: Start, teacher: TeacherFacts) -> tuple[int, int]:
        heads = int(getattr(self.config, "num_attention_heads", None) or 0)
        bottleneck = self.config.model_type == "mobilebert"
        return heads, int(self.config.true_hidden_size if bottleneck else self.config.hidden_size) if heads else 0

    def make_tokenizer(
        self,
        start: Start,
        teacher: TeacherFacts,
        texts: Callable[[], Sequence[str]],
        *,
        whole_words: bool = False,
    ) -> PreTrainedTokenizerBase:
        return self.tokenizer

    def build(self, start: Start, teacher: TeacherFacts, task: Task, tokenizer: PreTrainedTokenizerBase) -> Build:
        from safetensors import SafetensorError

        try:
            model, info = task.auto_class.from_pretrained(
                self.path,
                dtype="float32",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                **task.config_fields(),
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise RefusedError(
                f"student {self.path!r} cannot be opened with {task.auto_class.__name__}",
                details=[str(error).splitlines()[0][:300]],
                fix="give a text encoder whose weights are in the folder",
            ) from error
        mismatched = {str(entry[0]) for entry in info["mismatched_keys"]}
        return Build(model, {"tensors_made_anew": sorted({*info["missing_keys"], *mismatched})})

    def watch(self, model_output: Any, mask_BT: Tensor) -> StudentOutputs:
        from .bilstm import BiLstm

        if self.config.model_type == "kd-bilstm":
            return BiLstm().watch(model_output, mask_BT)
        return first_token_outputs(model_output, mask_BT)
