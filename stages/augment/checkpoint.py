"""Checkpoints that operators read words from: their files' hash, and their word table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ...pipeline.errors import RefusedError

_SUFFIXES = (".json", ".txt", ".model", ".spm", ".safetensors", ".bin")


def checkpoint_folder(source: str) -> Path:
    """The local folder of a checkpoint, by path or hub id; a hub checkpoint is fetched where it is not there.

    Raises:
        RefusedError: there is no such folder, and the hub has no such checkpoint or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise RefusedError(f"{source} is no checkpoint: there is no such folder", fix="give the folder of a checkpoint")
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"*{suffix}" for suffix in _SUFFIXES if suffix != ".bin"]
        folder = Path(snapshot_download(source, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["*.bin"])
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"{source} is no checkpoint: there is no such folder, and no such checkpoint on the hub",
            details=[(str(error).splitlines() or [""])[0][:200]],
            fix="give the folder of a checkpoint that transformers opens",
        ) from error
    return folder


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
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        files = [*Path(folder).iterdir()] if Path(folder).is_dir() else []
        if not any(file.name.startswith(("tokenizer", "vocab")) or file.suffix in (".spm", ".model") for file in files):
            raise RefusedError(f"there is no tokenizer in {folder}", fix="put the model's tokenizer there") from error
        said = [line.strip()[:200] for line in str(error).splitlines() if line.strip()][:1]
        if isinstance(error, ImportError):
            raise RefusedError(
                f"the tokenizer of {folder} needs a package that is not installed",
                details=said,
                fix='pip install "kd-pipeline[translate]", where it is a SentencePiece model without a tokenizer.json',
            ) from error
        raise RefusedError(f"the tokenizer of {folder} cannot be opened", details=said) from error


def most_positions(tokenizer: Any, config: Any) -> int:
    """The tokens that a model takes at once; `1 << 20` where neither it nor its tokenizer sets a limit."""
    from ..cache_teacher.teacher import max_positions

    return min(1 << 20, int(tokenizer.model_max_length), max_positions(config) or 1 << 20)


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
