"""Models that write text: opened and checked, batches of prompts by length, beam search and seeded sampling.

transformers' own sampling draws from one generator for a whole batch, so that a text would depend on which others share
its batch. Here every prompt brings its own draws in [0, 1), one per token: the token is the one at which the cumulated
probability passes the draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...pipeline.errors import RefusedError
from .checkpoint import load_tokenizer, most_positions
from .draws import FloatArray
from .threads import one_thread

NUM_BEAMS = 4
BATCH_TOKENS = 1 << 14
"""Tokens of a batch, those still to be written included. Part of the format: it decides which texts share a batch."""
MOST_NEW_TOKENS = 512
LEAST_POSITIONS = 16
"""A model with room for fewer tokens is refused."""
_ROLES = {"seq2seq": "translation model", "causal": "language model"}


def check_generator(folder: str | Path, kind: str) -> None:
    """Refuse a checkpoint that cannot do the work, before any text is read; reads no weights.

    Args:
        folder: of the checkpoint.
        kind: "seq2seq" or "causal".

    Raises:
        RefusedError: another kind of model, no tokenizer, no end token, or room for too few tokens.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"the checkpoint {folder} cannot be opened", details=[(str(error).splitlines() or [""])[0][:200]]
        ) from error
    classes: Any = {
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }[kind]
    expected, found = classes.get(config.model_type), config.architectures or []
    # Of some kinds of model there are several: a masked BERT would open as a language model, and write nonsense.
    if expected is None or (found and expected not in found):
        raise RefusedError(
            f"{folder} is no {_ROLES[kind]}: it is a {', '.join(found) or config.model_type}",
            fix=f"give a checkpoint that AutoModelFor{'Seq2Seq' if kind == 'seq2seq' else 'Causal'}LM opens, such as "
            + ("a Marian or T5 model" if kind == "seq2seq" else "GPT-2"),
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise RefusedError(f"{folder} is no {_ROLES[kind]} that kd can use: its tokenizer has no end token")
    room = most_positions(tokenizer, config)
    if room < LEAST_POSITIONS:
        raise RefusedError(
            f"{folder} takes no more than {room} tokens at once; {_ROLES[kind]}s need at least {LEAST_POSITIONS}",
            fix="set model_max_length in its tokenizer_config.json where that is not what the model takes",
        )


class Generator:
    """A model that writes text.

    Attributes:
        tokenizer: its tokenizer.
        room: tokens that it takes at once.

    Args:
        folder: a checkpoint that `check_generator` let pass.
        kind: "seq2seq" or "causal".
    """

    def __init__(self, folder: str, kind: str) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        self.tokenizer = load_tokenizer(folder)
        opener: Any = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
        try:
            model, loading = opener.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise RefusedError(
                f"{folder} is no {_ROLES[kind]}", details=[(str(error).splitlines() or [""])[0][:200]]
            ) from error
        if loading["missing_keys"]:
            raise RefusedError(
                f"{folder} is no {_ROLES[kind]}",
                details=[f"weights that are not there: {', '.join(sorted(loading['missing_keys'])[:3])}"],
            )
        self.room = most_positions(self.tokenizer, model.config)
        self._is_causal = kind == "causal"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        settings = model.generation_config
        ends = settings.eos_token_id if settings.eos_token_id is not None else self.tokenizer.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends])}
        pad = self.tokenizer.pad_token_id
        self._pad = min(self._ends) if pad is None else pad
        # What a checkpoint says of sampling is replaced. An end forced at the limit would hide that there was none.
        settings.do_sample, settings.temperature, settings.top_k, settings.top_p = False, None, None, None
        settings.max_length = settings.forced_eos_token_id = None
        settings.eos_token_id, settings.pad_token_id = sorted(self._ends), self._pad

    @property
    def computed_on(self) -> str:
        """Device and dtype, such as "cpu float32"."""
        return f"{self._device.type} {str(self._model.dtype).removeprefix('torch.')}"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of every text: with its end for a translation model, without for a language model."""
        rows: list[list[int]] = self.tokenizer([*texts])["input_ids"] if texts else []
        if self._is_causal:
            closing = self._ends | {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
            rows = [row[:-1] if len(row) > 1 and row[-1] in closing else row for row in rows]
        return rows

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode([*token_ids], skip_special_tokens=True)
        return text

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        most_new: Sequence[int],
        *,
        draws: Sequence[FloatArray] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
    ) -> list[tuple[list[int], bool]]:
        """Per prompt the tokens written and whether they came to an end; the end is not among them.

        Args:
            prompts: token ids, at least one each.
            most_new: at most so many tokens each.
            draws: at least `most_new` of each prompt, to sample by; beam search when not given.
            temperature: divides the logits before sampling.
            top_k: how many tokens are sampled from; all where it is 0.
        """
        written: dict[int, tuple[list[int], bool]] = {}
        factor = NUM_BEAMS if draws is None else 1
        with torch.inference_mode(), one_thread(self._device):
            for batch in _batches(prompts, most_new, factor):
                length = max(most_new[row] for row in batch)
                options: dict[str, Any] = {"num_beams": NUM_BEAMS}
                if draws is not None:
                    table_BL = np.zeros((len(batch), length))
                    for place, row in enumerate(batch):
                        table_BL[place, : most_new[row]] = draws[row][: most_new[row]]
                    by_draws = _ByDraws(torch.from_numpy(table_BL).to(self._device), temperature, top_k)
                    options = {"num_beams": 1, "early_stopping": False, "length_penalty": 1.0}
                    options["logits_processor"] = [by_draws]
                ids_BT, mask_BT = self._padded([prompts[row] for row in batch])
                out_BT = self._model.generate(
                    input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=length, **options
                )
                # What comes before the first token written: the prompt, or the token that starts a decoder.
                before = ids_BT.shape[1] if self._is_causal else 1
                for row, ids in zip(batch, out_BT[:, before:].tolist(), strict=True):
                    ids = ids[: most_new[row]]
                    end = next((place for place, token in enumerate(ids) if token in self._ends), None)
                    written[row] = (ids[:end], end is not None)
        return [written[row] for row in range(len(prompts))]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """`(ids_BT, mask_BT)`: padded on the left where the model goes on from the last token."""
        length = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), length), self._pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            place = slice(length - len(prompt), length) if self._is_causal else slice(0, len(prompt))
            ids_BT[row, place] = torch.tensor([*prompt])
            mask_BT[row, place] = 1
        return ids_BT.to(self._device), mask_BT.to(self._device)


@lru_cache(maxsize=2)
def load_generator(folder: str, kind: str, digest: str) -> Generator:
    """The model of a process; `digest` names its files, which may have changed since."""
    return Generator(folder, kind)


class _ByDraws:
    """Leaves of every row of logits the one token that its draw picks. A logits processor of transformers.

    Args:
        draws_BL: float64 in [0, 1), one per row and token.
        temperature: divides the logits.
        top_k: tokens sampled from; all where it is 0.
    """

    def __init__(self, draws_BL: torch.Tensor, temperature: float, top_k: int) -> None:
        self._draws_BL = draws_BL
        self._temperature = temperature
        self._top_k = top_k
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        # transformers may ask once more than it takes tokens.
        draws_B = self._draws_BL[:, min(self._step, self._draws_BL.shape[1] - 1)]
        self._step += 1
        count = min(self._top_k or scores_BV.shape[1], scores_BV.shape[1])
        # float64: cumulated over a vocabulary in float32, the tail would be rounded away.
        values_BK, tokens_BK = scores_BV.double().topk(count, dim=1)
        ends_BK = (values_BK / self._temperature).softmax(1).cumsum(1)
        targets_B1 = draws_B[:, None] * ends_BK[:, -1:]
        chosen_B1 = (ends_BK <= targets_B1).sum(1, keepdim=True).clamp(max=count - 1)
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, tokens_BK.gather(1, chosen_B1), 0.0)


def _batches(prompts: Sequence[Sequence[int]], most_new: Sequence[int], factor: int) -> Iterator[list[int]]:
    """Rows by length; at most `BATCH_TOKENS` tokens each, `factor` times each row, and at least one row."""
    batch: list[int] = []
    longest = 0
    for row in sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), most_new[row], row)):
        longest = max(longest, len(prompts[row]) + most_new[row])
        if batch and (len(batch) + 1) * longest * factor > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(prompts[row]) + most_new[row]
        batch.append(row)
    if batch:
        yield batch
