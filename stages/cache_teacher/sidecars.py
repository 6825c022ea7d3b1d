"""What is kept of the teacher beside its outputs: tensors by their names in the checkpoint, tokenizer, config."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import RefusedError, UsageError, near_match

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from ...pipeline.store import TeacherStore
    from .teacher import Teacher

SIDECARS = {
    "embeddings": "everything before the first layer: word table, positions, normalisation",
    "layers": "all transformer layers",
    "head": "everything after the last layer: pooler and classifier, or the masked-LM head with its word table",
}
"""Groups of teacher tensors that can be kept. Together they are the whole teacher."""

ATTENTION = "attn_in"
"""Query, key and value map of a layer, kept as `attn_in@LAYER`: what the layers have, under names of kd's own."""

TOKENIZER = "tokenizer"
CONFIG = "config"


def parse_sidecars(names: tuple[str, ...], num_layers: int | None = None) -> tuple[str, ...]:
    """The sidecars asked for, each once; "none" asks for nothing.

    Args:
        num_layers: of the teacher; None checks the names alone.

    Raises:
        UsageError: an unknown name, or layers that the teacher does not have.
    """
    from ...pipeline.store.signal import parse_layers

    wanted: dict[str, None] = {}
    for name in names:
        group, at, layers = name.partition("@")
        if group == ATTENTION and at:
            numbers = parse_layers(layers, 999 if num_layers is None else num_layers, name, first_layer=1)
            wanted |= {f"{ATTENTION}@{layer}": None for layer in numbers}
        elif name in SIDECARS:
            wanted[name] = None
        elif name != "none":
            known = [*SIDECARS, f"{ATTENTION}@LAYERS", "none"]
            raise UsageError(f"unknown sidecar {name!r}{near_match(name, known)}")
    return tuple(wanted)


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


PROOFS = {
    "embeddings.proof": "hidden.tok@0",
    "head.proof": "logits",
    "mlm.proof": "mlm.logits",
    "tokens.proof": "logits.tok",
    "attention.proof": "attention.score",
}
"""Sidecars that say that a signal follows as the lattice has it: a capture saw it."""
PROOF_FILE = "derives.json"


def proof_of(name: str) -> bytes:
    """What stands in a proof."""
    return json.dumps({"derives": PROOFS[name]}).encode() + b"\n"


def put_proof(store: TeacherStore, name: str) -> None:
    """Leave word that a derivation was seen to hold."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, PROOF_FILE).write_bytes(proof_of(name))
        store.put_file_sidecar(name, Path(folder))


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

    if is_of_tensors(name):
        if not has_sidecar(teacher, name):
            return None
        return "tensors", tensor_files(dict(tensors_of(teacher.load("auto"), name)))
    if name in PROOFS:
        return "files", {PROOF_FILE: proof_of(name)}
    if name not in (TOKENIZER, CONFIG):
        return None
    with tempfile.TemporaryDirectory() as folder:
        _save(teacher, name, folder)
        return "files", folder_files(folder)


def sidecar_bytes(teacher: Teacher, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes of each sidecar, from the config alone."""
    import torch

    with torch.device("meta"):
        model = teacher.auto_class.from_config(
            teacher.config, dtype=teacher.config.dtype, trust_remote_code=teacher.trust_remote_code
        )
    kept = dict.fromkeys(names, 0)
    for sidecar in names:
        header: dict[str, Any] = {}
        for name, tensor in sorted(_named_tensors(model, sidecar), key=lambda named: named[0]):
            size = tensor.numel() * (4 if tensor.dtype == torch.bfloat16 else tensor.element_size())
            # As safetensors describes it, in front of the numbers.
            offsets = [kept[sidecar], kept[sidecar] + size]
            header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": offsets}
            kept[sidecar] += size
        kept[sidecar] += 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8
    return kept


def is_of_tensors(name: str) -> bool:
    """Whether a sidecar of that name holds tensors of a teacher."""
    return name in SIDECARS or re.fullmatch(rf"{ATTENTION}@[1-9][0-9]{{0,2}}", name) is not None


def has_sidecar(teacher: Teacher, name: str) -> bool:
    """Whether a sidecar of tensors can be of this teacher: it has that layer."""
    return int(name.partition("@")[2] or 0) <= teacher.num_layers


def tensors_of(model: nn.Module, sidecar: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every tensor of a sidecar, in order; names are the checkpoint's but for `attn_in@LAYER`."""
    import torch

    for name, tensor in _named_tensors(model, sidecar):
        yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def _named_tensors(model: nn.Module, sidecar: str) -> Iterator[tuple[str, Tensor]]:
    from .attention import attention_maps

    group, _, layer = sidecar.partition("@")
    if group == ATTENTION:
        for name, linear in zip(("query", "key", "value"), attention_maps(model, int(layer)), strict=True):
            for part, tensor in linear.state_dict().items():
                yield f"{name}.{part}", tensor
        return
    tensors = model.state_dict()
    for name, its_group in groups_of(model).items():
        if its_group == sidecar:
            yield name, tensors[name]


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
