"""Checkpoints that operators read words from: their files' hash, and their word table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ...pipeline.errors import RefusedError

_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")


def checkpoint_digest(folder: str | Path) -> str:
    """32 hex: hash of a checkpoint's configuration, tokenizer and weights, as files.

    Raises:
        RefusedError: the folder is not a checkpoint.
    """
    if not (Path(folder) / "config.json").is_file():
        raise RefusedError(
            f"{folder} is no checkpoint: there is no config.json",
            fix="give the folder of a checkpoint that transformers opens, such as a teacher",
        )
    digest = xxhash.xxh3_128()
    for file in sorted(Path(folder).iterdir()):
        # A teacher that kd trained has a manifest, with the time it took.
        if file.suffix in _SUFFIXES and file.name != "manifest.json" and file.is_file():
            digest.update(file.name.encode() + b"\x00")
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint; RefusedError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"the tokenizer of {folder} cannot be opened", details=[(str(error).splitlines() or [""])[0][:200]]
        ) from error


def load_word_table(folder: str | Path) -> tuple[npt.NDArray[np.float32], Any]:
    """`(table_VH, tokenizer)`: the input embeddings of a checkpoint, float32, and its tokenizer."""
    from transformers import AutoModel

    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"the checkpoint {folder} cannot be opened", details=[(str(error).splitlines() or [""])[0][:200]]
        ) from error
    return model.get_input_embeddings().weight.detach().float().numpy(), tokenizer
