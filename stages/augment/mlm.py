"""Operator `mlm`: a word becomes what a masked language model would say in its place.

TinyBERT's augmentation (Jiao et al., 2020; `data_augmentation.py`): a content word of one piece is masked, the sentence
follows as second segment as it is, and the best pieces that are words are its candidates; for a word of several pieces
they are its neighbours in the model's own word table (TinyBERT: in GloVe). The lists are made once and serve all
variants.

Batches follow from the chunk alone and one thread computes each, beside others, so that lists do not depend on who
makes them. A list is kept in the order of the vocabulary: where processors round two scores differently, only whether
the last word is on it can change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ...pipeline.errors import RefusedError
from ..cache_teacher.onednn import use_onednn
from ..cache_teacher.runner import plan_batches
from .candidates import cased_like, is_content_word
from .checkpoint import load_tokenizer, most_positions
from .generate import PIECES, Plan, pools_of, read_arrow, write_arrow
from .threads import one_thread
from .vocabulary import whole_words, word_pieces

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included. Part of the format: it decides which sentences share a batch."""
MOST_TOKENS = 512


@dataclass(frozen=True)
class Blank:
    """One word that a list is wanted for.

    Attributes:
        place: which of the words of the chunk it is.
        token_ids: the sentence with the word masked, and again as it is.
        masked_at: where the mask token stands.
        num_first: tokens of the first segment.
        piece: the word's own piece.
    """

    place: int
    token_ids: list[int]
    masked_at: int
    num_first: int
    piece: int


class MaskedLM:
    """A masked language model that fills blanks.

    Args:
        folder: a checkpoint that `AutoModelForMaskedLM` opens.
        num_candidates: words per list.
    """

    def __init__(self, folder: str, num_candidates: int) -> None:
        from transformers import AutoModelForMaskedLM

        self.tokenizer = load_tokenizer(folder)
        try:
            model, loading = AutoModelForMaskedLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise RefusedError(
                f"{folder} is no masked language model", details=[(str(error).splitlines() or [""])[0][:200]]
            ) from error
        lacking = [f"no {name} token" for name in ("mask", "cls", "sep", "pad") if self._special(name) is None]
        if loading["missing_keys"] or lacking:
            missing = sorted(loading["missing_keys"])
            raise RefusedError(
                f"{folder} is no masked language model",
                details=[f"weights that are not there: {', '.join(missing[:3])}" if missing else ", ".join(lacking)],
                fix="give a checkpoint with a masked-LM head, such as bert-base-uncased",
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        use_onednn(self._model)
        self._num_candidates = num_candidates
        self._of_this_thread = threading.local()
        known = whole_words(self.tokenizer)
        self._names = [*known.values()]
        self._known = torch.tensor([*known], device=self._device)
        spellings: dict[str, list[int]] = {}
        for row, name in enumerate(self._names):
            spellings.setdefault(name.lower(), []).append(row)
        self._own_rows = {piece: spellings[name.lower()] for piece, name in known.items()}
        self._pieces: dict[str, list[int]] = {}
        self._most_tokens = min(MOST_TOKENS, most_positions(self.tokenizer, model.config))

    def _special(self, name: str) -> int | None:
        found: int | None = getattr(self.tokenizer, f"{name}_token_id")
        return found

    def pieces(self, word: str) -> list[int]:
        """The token ids of a word within a text."""
        found = self._pieces.get(word)
        if found is None:
            found = self._pieces[word] = word_pieces(self.tokenizer, [word])[0]
        return found

    def blanks(self, words: Sequence[str], first_place: int) -> Iterator[Blank]:
        """The content words of one text that are one piece; none beyond the length that the model takes."""
        tokenizer = self.tokenizer
        pieces = [self.pieces(word) for word in words]
        whole = [piece for word in pieces for piece in word]
        between = [tokenizer.sep_token_id] * (tokenizer.num_special_tokens_to_add(pair=True) - 2)
        at = 1
        for number, (word, ids) in enumerate(zip(words, pieces, strict=True)):
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and is_content_word(word):
                first = [tokenizer.cls_token_id, *whole, *between]
                first[at] = tokenizer.mask_token_id
                token_ids = [*first, *whole, tokenizer.sep_token_id][: self._most_tokens]
                if at < len(token_ids):
                    yield Blank(first_place + number, token_ids, at, min(len(first), len(token_ids)), ids[0])
            at += len(ids)

    def fill(
        self, blanks: Sequence[Blank], advance: Callable[[int], None] = lambda count: None
    ) -> dict[int, list[str]]:
        """The candidates of every blank by its place, in the order of the vocabulary; never the word itself."""
        lists: dict[int, list[str]] = {}
        planned = plan_batches(np.array([len(blank.token_ids) for blank in blanks]), BATCH_TOKENS)
        batches = [[blanks[slot] for slot in slots.tolist()] for slots in planned]
        # As many as torch has threads, each computed by one: their sums are then of one order.
        pool = ThreadPoolExecutor(torch.get_num_threads() if self._device.type == "cpu" else 1)
        with one_thread(self._device), self._only_masked():
            try:
                for batch, found in zip(batches, pool.map(self._fill, batches), strict=True):
                    lists.update(zip([blank.place for blank in batch], found, strict=True))
                    advance(len(batch))
            finally:
                pool.shutdown(cancel_futures=True)
        return lists

    @torch.inference_mode()
    def _fill(self, batch: Sequence[Blank]) -> list[list[str]]:
        length = max(len(blank.token_ids) for blank in batch)
        ids_BT = torch.full((len(batch), length), self.tokenizer.pad_token_id)
        mask_BT, segment_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
        for row, blank in enumerate(batch):
            size = len(blank.token_ids)
            ids_BT[row, :size] = torch.tensor(blank.token_ids)
            mask_BT[row, :size] = 1
            segment_BT[row, blank.num_first : size] = 1
        self._of_this_thread.masked_at = torch.tensor([blank.masked_at for blank in batch], device=self._device)
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if getattr(self._model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segment_BT
        logits_B1V = self._model(**{name: tensor.to(self._device) for name, tensor in inputs.items()}).logits
        scores_BK = logits_B1V[:, 0].index_select(1, self._known)
        for row, blank in enumerate(batch):
            # In whatever capitals: a vocabulary may have both "film" and "Film".
            scores_BK[row, self._own_rows.get(blank.piece, [])] = -torch.inf
        scores_BM, best_BM = scores_BK.topk(min(self._num_candidates, len(self._names)), dim=1)
        return [
            [self._names[number] for number, score in sorted(zip(best, scores, strict=True)) if score > -torch.inf]
            for best, scores in zip(best_BM.tolist(), scores_BM.tolist(), strict=True)
        ]

    @contextmanager
    def _only_masked(self) -> Iterator[None]:
        """What follows the last attention sees the states of the masked tokens alone: the head, which is half of the
        work of a small model where it sees all, and where it can be the rest of the last layer."""

        def pick(states_BTH: torch.Tensor) -> torch.Tensor:
            return states_BTH[torch.arange(len(states_BTH)), self._of_this_thread.masked_at][:, None]

        def pick_last(module: Any, inputs: Any, outputs: Any) -> Any:
            outputs["last_hidden_state"] = pick(outputs[0])
            return outputs

        layers = getattr(getattr(self._model.base_model, "encoder", None), "layer", None)
        # A layer that transformers can compute in chunks of tokens: after its attention, no token looks at another.
        if layers is not None and hasattr(layers[-1], "feed_forward_chunk") and hasattr(layers[-1], "attention"):
            handle = layers[-1].attention.register_forward_hook(
                lambda module, inputs, outputs: (pick(outputs[0]), *outputs[1:])
            )
        else:
            handle = self._model.base_model.register_forward_hook(pick_last)
        try:
            yield
        finally:
            handle.remove()


@lru_cache(maxsize=1)
def _masked_lm(folder: str, digest: str, num_candidates: int) -> MaskedLM:
    return MaskedLM(folder, num_candidates)


@dataclass(frozen=True)
class MlmJob:
    """Lists the candidates of every place of a chunk."""

    plan: Plan
    folder: str
    num_candidates: int

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[int, pa.Table]:
        plan = self.plan
        model = _masked_lm(self.folder, plan.digest, self.num_candidates)
        words = pools_of(plan).words
        neighbours = read_arrow(plan.folder / PIECES)["candidates"]
        sides = plan.texts(shard)
        blanks: list[Blank] = []
        first = 0
        for side in sides:
            for row in range(len(side)):
                text = [words[number] for number in side[row]]
                blanks += model.blanks(text, first + int(side.offsets[row]))
            first += len(side.values)
        found = model.fill(blanks)
        advance(len(sides[0]))
        numbers = np.concatenate([side.values for side in sides]).tolist()
        lists = [
            [*dict.fromkeys(cased_like(other, words[number]) for other in found[place])]
            if place in found
            else neighbours[number].as_py()
            for place, number in enumerate(numbers)
        ]
        letters = np.repeat([*plan.letters()], [len(side.values) for side in sides])
        return shard, pa.table({"side": pa.array(letters), "candidates": pa.array(lists, pa.list_(pa.string()))})

    def finish(self, computed: tuple[int, pa.Table]) -> int:
        chunk, table = computed
        write_arrow(table, self.plan.file("mlm", chunk))
        return chunk
