"""Watching what a student's attention works on: queries, keys and values of every block, at its own kernel's speed.

Dimension key: B examples, H heads, T token positions, D features of all heads.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...pipeline.errors import RefusedError
from .methods.base import Heads

KERNEL = "kd_watched"


class AttentionWatch:
    """While open, keeps what every attention of a model is called with, in the order of its blocks.

    It stands in for the model's attention kernel through transformers' attention interface, and hands on to that
    kernel (`sdpa` for a model set to `eager`), so outputs are those of the model unwatched. Queries and keys are seen
    after rotary embedding and before dropout.

    Args:
        model: its config names the kernel.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config
        self._calls: list[Heads] = []
        self._kernel = ""

    def __enter__(self) -> AttentionWatch:
        global _open
        assert _open is None, "one watch at a time"
        self._calls = []
        self._kernel = self._config._attn_implementation or "sdpa"
        self._forward = ALL_ATTENTION_FUNCTIONS.get(self._kernel, sdpa_attention_forward)
        mask_kernel = (
            self._kernel if self._kernel in ALL_MASK_ATTENTION_FUNCTIONS and self._kernel != "eager" else "sdpa"
        )
        # Without a mask function of the same name the kernel would be called without a mask, and attend to padding.
        AttentionMaskInterface.register(KERNEL, ALL_MASK_ATTENTION_FUNCTIONS[mask_kernel])
        AttentionInterface.register(KERNEL, _watched)
        self._config._attn_implementation = KERNEL
        _open = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open
        _open = None
        self._config._attn_implementation = self._kernel

    def heads(self) -> dict[int, Heads]:
        """By block (1..L), as the last forward pass called its attention."""
        return dict(enumerate(self._calls, 1))

    def keep(self, module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        """Keep one call, and answer it as the model's own kernel does."""
        scaling = named.get("scaling")
        self._calls.append(Heads(query, key, value, query.shape[-1] ** -0.5 if scaling is None else float(scaling)))
        return self._forward(module, query, key, value, *rest, **named)


_open: AttentionWatch | None = None


def _watched(module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
    assert _open is not None, "called outside of a watch"
    return _open.keep(module, query, key, value, *rest, **named)


def watch_attention(model: PreTrainedModel, *, heads: int, width: int, described: str) -> AttentionWatch:
    """A watch over `model`, tried on two tokens.

    Args:
        heads, width: H and D that every block must have.
        described: the student, for messages.

    Raises:
        RefusedError: its attention does not go through transformers' interface once per block, or is of another shape.
    """
    watch = AttentionWatch(model)
    was_training = model.training
    model.train(False)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), watch:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    model.train(was_training)
    found = [tuple(part.shape) for call in watch.heads().values() for part in call[:3]]
    num_layers = int(model.config.num_hidden_layers)
    if len(found) != 3 * num_layers or {*found} != {(1, heads, 2, width // heads)}:
        raise RefusedError(
            f"the attention of student {described!r} cannot be watched, and a method compares it",
            details=[
                f"expected: {num_layers} blocks with queries, keys and values of {heads} heads, {width} wide in all",
                f"found: {len(found) // 3} calls" + (f", shapes {sorted({*found})}" if found else ""),
            ],
            fix="a method that reads hidden states or logits, or a student of class bert or mobilebert",
        )
    return watch
