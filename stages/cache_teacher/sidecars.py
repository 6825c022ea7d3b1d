"""What is kept of the teacher beside its outputs: tensors by their names in the checkpoint, tokenizer, config."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import RefusedError, UsageError, near_match

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ...pipeline.store import TeacherStore
    from .teacher import Teacher

SIDECARS = {
    "embeddings": "everything before the first layer: word table, positions, normalisation",
    "layers": "all transformer layers",
    "head": "everything after the last layer: pooler and classifier",
}
"""Groups of teacher tensors that can be kept. Together they are the whole teacher."""

TOKENIZER = "tokenizer"
CONFIG = "config"


def parse_sidecars(names: tuple[str, ...]) -> tuple[str, ...]:
    """The sidecars asked for, each once; "none" asks for nothing.

    Raises:
        UsageError: an unknown name.
    """
    wanted = tuple(dict.fromkeys(name for name in names if name != "none"))
    for name in wanted:
        if name not in SIDECARS:
            raise UsageError(f"unknown sidecar {name!r}{near_match(name, [*SIDECARS, 'none'])}")
    return wanted


def missing_sidecars(store: TeacherStore, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that the store does not keep yet."""
    return tuple(name for name in names if not store.has_sidecar(name))


def put_sidecars(store: TeacherStore, model: nn.Module, names: tuple[str, ...]) -> None:
    """Copy groups of the teacher's tensors into the store, float32 or float16 as the checkpoint has them.

    Args:
        model: the teacher in its checkpoint's dtype; bfloat16, which numpy lacks, is kept as float32.
    """
    for name in names:
        tensors = dict(tensors_of(model, name))
        if not tensors:
            raise RefusedError(f"the teacher ({type(model).__name__}) has no tensors for sidecar {name!r}")
        store.put_sidecar(name, tensors)


def put_files(store: TeacherStore, teacher: Teacher) -> None:
    """Keep the teacher's tokenizer and config, so that a student never needs the teacher's folder."""
    for name in (TOKENIZER, CONFIG):
        if not store.has_sidecar(name):
            with tempfile.TemporaryDirectory() as folder:
                _save(teacher, name, folder)
                store.put_file_sidecar(name, Path(folder))


def _save(teacher: Teacher, name: str, folder: str) -> None:
    if name == TOKENIZER:
        _forget_lengths(teacher.tokenizer)
        teacher.tokenizer.save_pretrained(folder)
    else:
        teacher.config.save_pretrained(folder)


def sidecar_contents(teacher: Teacher, name: str) -> tuple[str, dict[str, bytes]] | None:
    """(kind, files) of a sidecar as the teacher gives it now; None for a name that kd does not use."""
    from ...pipeline.store.sidecar import folder_files, tensor_files

    if name in SIDECARS:
        return "tensors", tensor_files(dict(tensors_of(teacher.load("auto"), name)))
    if name not in (TOKENIZER, CONFIG):
        return None
    with tempfile.TemporaryDirectory() as folder:
        _save(teacher, name, folder)
        return "files", folder_files(folder)


def sidecar_bytes(teacher: Teacher, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes of each sidecar, from the config alone."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if teacher.has_head else AutoModel
    with torch.device("meta"):
        model = auto.from_config(
            teacher.config, dtype=teacher.config.dtype, trust_remote_code=teacher.trust_remote_code
        )
    kept, headers = dict.fromkeys(names, 0), dict[str, dict[str, Any]]()
    for name, group in groups_of(model).items():
        if group in kept:
            tensor = model.state_dict()[name]
            size = tensor.numel() * (4 if tensor.dtype == torch.bfloat16 else tensor.element_size())
            # As safetensors describes it, in front of the numbers.
            offsets = [kept[group], kept[group] + size]
            headers.setdefault(group, {})[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": offsets}
            kept[group] += size
    for group, header in headers.items():
        kept[group] += 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8
    return kept


def tensors_of(model: nn.Module, group: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the checkpoint, tensor) of every tensor of one group, in order."""
    import torch

    tensors = model.state_dict()
    for name, its_group in groups_of(model).items():
        if its_group == group:
            tensor = tensors[name]
            yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def groups_of(model: nn.Module) -> dict[str, str]:
    """Which sidecar each tensor of a teacher belongs to, by its name in the checkpoint.

    The part of the encoder that holds the list of layers divides it: what is registered before is read before.
    """
    from torch import nn

    base = getattr(model, "base_model", model)
    prefix = "" if base is model else f"{getattr(model, 'base_model_prefix', '')}."
    part_of: dict[str, str] = {}
    part = "embeddings"
    for name, child in base.named_children():
        if part == "embeddings" and any(isinstance(module, nn.ModuleList) for module in child.modules()):
            part_of[name], part = "layers", "head"
        else:
            part_of[name] = part
    groups = {}
    for name in model.state_dict():
        first = name.removeprefix(prefix).partition(".")[0]
        groups[name] = part_of.get(first, "embeddings") if name.startswith(prefix) else "head"
    return groups


def _forget_lengths(tokenizer: Any) -> None:
    """Truncation and padding of the last call are no part of a tokenizer, yet would be saved with it."""
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
