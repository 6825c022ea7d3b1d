"""Opening a finished student: `kd.load_student`. Imports no training code, no store and no other stage.

Dimension key: N texts, C labels, W words of all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...pipeline.errors import RefusedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


OF_TOKENS = "ForTokenClassification"
"""How the names of models of token tasks end."""


class LoadedStudent(NamedTuple):
    """A student and its tokenizer: unpack it, or call it with texts; of a token task, with lists of words.

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

    @property
    def tags_words(self) -> bool:
        """Whether it predicts a tag for every word."""
        return type(self.model).__name__.endswith(OF_TOKENS)

    def __call__(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        second_texts: Sequence[str] | None = None,
        *,
        batch_size: int = 64,
    ) -> np.ndarray:
        """float32 [N, C] logits of texts, or of pairs with `second_texts`, in their order.

        Of a token task [W, C] of the words of all texts, one after another; NaN of a word that was cut off, or of which
        the tokenizer leaves nothing.

        Texts of similar length are batched together, so that little of a batch is padding.
        """
        import numpy as np
        import torch

        if self.tags_words:
            return self._of_words(texts, batch_size)
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

    def tags(self, rows: Sequence[Sequence[str]], *, batch_size: int = 64) -> list[list[str | None]]:
        """The tag of every word of every row; None of a word that it does not see (see `__call__`).

        Raises:
            UsageError: the student is of no token task, or a row is no list of words.
        """
        import numpy as np

        if not self.tags_words:
            raise UsageError("this student predicts nothing of words", fix="call it with texts: student([...])")
        names, found = self.label_names, iter(self._of_words(rows, batch_size))
        logits = [[next(found) for _ in words] for words in rows]
        return [[None if np.isnan(word[0]) else names[int(word.argmax())] for word in row] for row in logits]

    def _of_words(self, rows: Sequence[str] | Sequence[Sequence[str]], batch_size: int) -> np.ndarray:
        import numpy as np
        import torch

        from ..words import first_pieces

        for row, words in enumerate(rows):
            if isinstance(words, str) or not words or not all(word and " " not in word for word in words):
                raise UsageError(
                    f"row {row} is no list of words without spaces: {words!r:.100}",
                    fix='give lists of words: [["EU", "rejects"]]',
                )
        texts = [" ".join(words) for words in rows]
        starts = np.cumsum([0, *map(len, rows)])
        logits_WC = np.full((int(starts[-1]), len(self.label_names)), np.nan, np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            shown = [texts[row] for row in batch]
            inputs = self.tokenizer(shown, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                logits_BTC = self.model(**inputs.to(self.model.device)).logits.float().cpu().numpy()
            for place, row in enumerate(batch.tolist()):
                pieces = first_pieces(inputs.encodings[place], shown[place])
                seen = np.flatnonzero(pieces >= 0)
                logits_WC[starts[row] + seen] = logits_BTC[place, pieces[seen]]
        return logits_WC


def load_student(path: str | Path, *, device: str = "cpu") -> LoadedStudent:
    """Open a run folder, or any classifier of sequences or tokens that transformers opens.

    Raises:
        RefusedError: nothing there, a run that is not finished, or a student of text without labels.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise RefusedError(
            f"student {path}: no config.json in that folder",
            fix="give the --output-dir of a finished kd train-student",
        )
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    from . import bilstm_model  # noqa: F401  (makes the Auto classes know the BiLSTM)

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    architectures = config.architectures or []
    of_tokens = any(name.endswith(OF_TOKENS) for name in architectures)
    if (
        architectures
        and not of_tokens
        and not any(name.endswith("ForSequenceClassification") for name in architectures)
    ):
        raise RefusedError(
            f"student {path} ({', '.join(config.architectures)}) is for no task: its classifier would be random",
            fix=f"fine-tune it: kd train-student --student {path} --view VIEW",
        )
    auto: Any = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return LoadedStudent(model.eval().to(device), tokenizer)
