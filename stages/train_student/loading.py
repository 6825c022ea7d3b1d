"""Opening a finished student: `kd.load_student`. Imports no training code, no store and no other stage.

Dimension key: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...pipeline.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoadedStudent(NamedTuple):
    """A student and its tokenizer: unpack it, or call it with texts.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer; cuts where the student was cut in training.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def label_names(self) -> list[str]:
        """Names of the logits' columns."""
        names = {int(index): str(name) for index, name in (self.model.config.id2label or {}).items()}
        return [names[index] for index in sorted(names)]

    def __call__(
        self, texts: Sequence[str], second_texts: Sequence[str] | None = None, *, batch_size: int = 64
    ) -> np.ndarray:
        """float32 [N, C] logits of texts, or of pairs with `second_texts`, in their order.

        Texts of similar length are batched together, so that little of a batch is padding.
        """
        import numpy as np
        import torch

        sides = [texts] if second_texts is None else [texts, second_texts]
        lengths = [sum(map(len, row)) for row in zip(*sides, strict=True)]
        order = np.argsort(lengths, kind="stable")
        logits_NC = np.empty((len(order), len(self.label_names)), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = self.tokenizer(
                *([side[row] for row in rows] for side in sides), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                output = self.model(**inputs.to(self.model.device))
            logits_NC[rows] = output.logits.float().cpu().numpy()
        return logits_NC


def load_student(path: str | Path, *, device: str = "cpu") -> LoadedStudent:
    """Open a run folder, or any sequence classifier that transformers opens.

    Raises:
        RefusedError: nothing there, a run that is not finished, or a student of text without labels.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise RefusedError(
            f"student {path}: no config.json in that folder",
            fix="give the --output-dir of a finished kd train-student",
        )
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from . import bilstm_model  # noqa: F401  (makes the Auto classes know the BiLSTM)

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if config.architectures and not any(name.endswith("ForSequenceClassification") for name in config.architectures):
        raise RefusedError(
            f"student {path} ({', '.join(config.architectures)}) is for no task: its classifier would be random",
            fix=f"fine-tune it: kd train-student --student {path} --view VIEW",
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return LoadedStudent(model.eval().to(device), tokenizer)
