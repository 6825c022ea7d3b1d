"""Attention inside a teacher: its query, key and value maps, and what is captured as they compute.

Fused attention kernels return no attention; the maps in front of them are plain linear layers, so hooks on those see
all that scores are made of, and the fast kernel stays.

Dimension key: B rows of a batch, T padded length, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...pipeline.errors import RefusedError
from ..derivation import scores

MAP_NAMES = (
    *(("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    ("query_proj", "key_proj", "value_proj"),
)
"""What BERT, RoBERTa and ELECTRA, then DistilBERT, then newer models, MPNet and DeBERTa call them."""

Maps = tuple[nn.Linear, nn.Linear, nn.Linear]


def layer_modules(model: nn.Module) -> list[nn.Module] | None:
    """The transformer layers in order: the one list of modules that is as long as the config says."""
    num_layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    return list(found[0]) if found else None


def attention_maps(model: nn.Module, layer: int) -> Maps:
    """Query, key and value map of a block (1 is the first).

    Raises:
        RefusedError: they are not three linear maps of the hidden width, one each.
    """
    blocks = layer_modules(model)
    if blocks is not None:
        width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        found: list[list[nn.Linear]] = []
        for module in blocks[layer - 1].modules():
            children = dict(module.named_children())
            for names in MAP_NAMES:
                maps = [child for name in names if isinstance(child := children.get(name), nn.Linear)]
                if len(maps) == 3 and all(linear.out_features == width for linear in maps):
                    found.append(maps)
        if len(found) == 1:
            query, key, value = found[0]
            return query, key, value
    raise RefusedError(
        f"the attention of a {type(model).__name__} (layer {layer}) is not made of one query, key and value map each",
        details=["known: " + "; ".join(", ".join(names) for names in MAP_NAMES)],
        fix="ask for hidden states instead (hidden.tok)",
    )


def hook_maps(
    model: nn.Module, wants: dict[int, bool], keep: Callable[[int, tuple[Tensor, ...]], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `keep(layer, (query_BTD, key_BTD[, value_BTD]))` as soon as a block has computed them.

    Args:
        wants: per layer, whether the value is wanted too.
    """
    hooks = []
    for layer, with_value in wants.items():
        collected: dict[int, Tensor] = {}
        maps = attention_maps(model, layer)[: 3 if with_value else 2]
        for number, linear in enumerate(maps):
            hooks.append(linear.register_forward_hook(_collect(layer, number, len(maps), collected, keep)))
    return hooks


def _collect(
    layer: int, number: int, count: int, collected: dict[int, Tensor], keep: Callable[[int, tuple[Tensor, ...]], None]
) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        collected[number] = output
        if len(collected) == count:
            outputs = tuple(collected[place] for place in range(count))
            collected.clear()
            keep(layer, outputs)

    return hook


def require_true_scores(model: nn.Module, layers: Iterable[int], device: torch.device) -> None:
    """Compare the scores of a small trial with the attention that the model itself reports.

    Raises:
        RefusedError: their softmax is another (rotary or relative positions, say), or the model reports none.
    """
    layers = sorted(layers)
    found: dict[int, Tensor] = {}
    num_heads = int(model.config.num_attention_heads)  # type: ignore[union-attr,arg-type]
    ids_BT, mask_BT = _trial(model, device)
    hooks = hook_maps(
        model,
        dict.fromkeys(layers, False),
        lambda layer, maps: found.__setitem__(layer, scores(maps[0], maps[1], num_heads)),
    )
    try:
        with _eager(model), torch.inference_mode():
            output = model(input_ids=ids_BT, attention_mask=mask_BT, return_dict=True, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    attentions: Sequence[Tensor] = getattr(output, "attentions", None) or ()
    what = "it reports no attention to compare them with"
    if len(attentions) == int(model.config.num_hidden_layers):  # type: ignore[union-attr,arg-type]
        inside_B1T = mask_BT[:, None, :].bool()
        exact = next(model.parameters()).dtype == torch.float32
        worst = 0.0
        for layer in layers:
            masked = found[layer].masked_fill(~inside_B1T[:, None], float("-inf"))
            differences = (masked.softmax(-1) - attentions[layer - 1].float()).abs()
            worst = max(worst, float(differences.transpose(1, 2)[mask_BT.bool()].max()))
        if worst <= (1e-4 if exact else 2e-2):
            return
        what = f"their softmax differs from its attention by up to {worst:.2g} (rotary or relative positions?)"
    raise RefusedError(
        f"the attention scores of a {type(model).__name__} are not query times key / sqrt(head width)",
        details=[what],
        fix="ask for attention.qkv, which is what its linear maps give, or for hidden states (hidden.tok)",
    )


def _trial(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [2, 8] of two rows, one of them shorter."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids_BT = torch.arange(16, device=device).reshape(2, 8) % vocabulary
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    return ids_BT, mask_BT


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The model with the attention that reports itself."""
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
