"""The teacher: what it is (identity), whether it may be used (refusals), and loading it.

Everything that can be known without weights comes from `describe_teacher`, so that bad input is refused before a
model loads. The digest of the tensors needs the weights once; afterwards it is looked up by the stat of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.artifact import atomic_write_bytes
from ...pipeline.errors import RefusedError, UsageError, near_match
from ...pipeline.fingerprint import differing_fields, fingerprint
from ...pipeline.user_cache import user_cache_folder
from ..masking import Masking
from .identity import behaviour_config, code_digest, code_references, tensor_digest, tokenizer_identity

if TYPE_CHECKING:
    from torch import nn

    from ...pipeline.store import StoreIdentity, TeacherStore
    from ...pipeline.store.signal import Sizes

TASK_OF_PROBLEM = {
    "single_label_classification": "single-label",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}
DTYPES = ("float32", "bfloat16", "float16")

WEIGHT_SUFFIXES = (".safetensors", ".bin")
TOKENIZER_FILES = {
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spm.model", "bpe.codes", "tiktoken.model"),
}
MASKED_LM = ("ForMaskedLM", "ForPreTraining")
"""Ends of the names of classes with a masked-LM head."""
OF_SEQUENCES, OF_TOKENS = "ForSequenceClassification", "ForTokenClassification"
"""Ends of the names of classes with a classifier."""
# Position ids of these models start at padding index + 1, which takes that many positions away.
OFFSET_POSITIONS = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text"),
    *("mpnet", "longformer", "ibert", "xmod", "luke", "esm"),
}
# Buffers that old checkpoints carry and today's classes compute.
COMPUTED_BUFFERS = {"position_ids", "token_type_ids", "inv_freq"}


@dataclass(frozen=True)
class Teacher:
    """A teacher folder, known without its weights.

    Attributes:
        source: path or hub id as the user gave it.
        folder: where its files are.
        config: its transformers config.
        tokenizer: its tokenizer.
        has_head: whether it is a classifier, of sequences or of tokens (gives logits), or is used as an encoder (hidden
            states only).
        trust_remote_code: whether code from the checkpoint may run.
        masking: how its texts are masked, where it is used as a masked LM (see `masked`).
    """

    source: str
    folder: Path
    config: Any
    tokenizer: Any
    has_head: bool
    trust_remote_code: bool
    masking: Masking | None = None
    _kept: list[nn.Module] = field(default_factory=list, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """Number of transformer layers; hidden states are numbered 0 (embedding output) to this."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table: token ids are below it."""
        return int(self.config.vocab_size)

    @property
    def num_labels(self) -> int:
        """Columns of the logits."""
        return int(self.config.num_labels) if self.has_head else 0

    @property
    def num_heads(self) -> int:
        """Attention heads of a layer; 0 where its config does not say."""
        heads = getattr(self.config, "num_attention_heads", 0)
        return heads if isinstance(heads, int) else 0

    @property
    def sizes(self) -> Sizes:
        """What entries of its outputs are made of."""
        from ...pipeline.store.signal import Sizes

        slots, vocabulary = (self.masking.slots, self.vocab_size) if self.masking else (0, 0)
        return Sizes(self.num_labels, self.hidden_size, self.num_heads, slots, vocabulary)

    @property
    def head(self) -> str:
        """What is loaded on top of the encoder: "sequence-classification", "token-classification", "masked-lm" or
        "none"."""
        if self.masking is not None:
            return "masked-lm"
        if self.tags_tokens:
            return "token-classification"
        return "sequence-classification" if self.has_head else "none"

    @property
    def tags_tokens(self) -> bool:
        """Whether its head classifies tokens."""
        return self.has_head and any(name.endswith(OF_TOKENS) for name in self.config.architectures or ())

    @property
    def is_masked_lm(self) -> bool:
        """Whether the checkpoint has a masked-LM head, by its config."""
        return any(name.endswith(MASKED_LM) for name in self.config.architectures or ())

    def masked(self, *, share: float, seed: int, max_length: int) -> Teacher:
        """It as a masked LM over masked texts.

        Args:
            share, seed: see `Masking`.
            max_length: tokens per row asked for; the teacher may take fewer.

        Raises:
            RefusedError: it has no masked-LM head, or its tokenizer no mask token.
        """
        if not self.is_masked_lm:
            architectures = self.config.architectures or []
            raise RefusedError(
                f"teacher {self.source} has no masked-LM head, and masked texts are for one",
                details={"architectures": ", ".join(architectures or ["(none)"])},
                fix="a checkpoint that AutoModelForMaskedLM opens whole; leave --mask-share out for hidden states",
            )
        if self.tokenizer.mask_token_id is None:
            raise RefusedError(f"teacher {self.source}: its tokenizer has no mask token")
        longest = min(max_length, self.max_tokens)
        masking = Masking.of(self.tokenizer, share=share, seed=seed, max_length=longest)
        return replace(self, masking=masking, _kept=[])

    def as_captured(self, store: TeacherStore) -> Teacher:
        """It as a store was captured: a masked LM where the store's rows are masked."""
        capture = store.identity.capture
        masking = Masking.from_capture(capture)
        if masking is None:
            return self
        return self.masked(share=masking.share, seed=masking.seed, max_length=int(capture["max_length"]))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the logits' columns, in their order; empty for a bare encoder."""
        if not self.has_head:
            return ()
        names = {int(index): str(name) for index, name in self.config.id2label.items()}
        if sorted(names) != list(range(self.num_labels)):
            raise RefusedError(
                f"teacher {self.source}: id2label does not name the labels 0 to {self.num_labels - 1}",
                details={"id2label": names},
                fix="correct id2label and label2id in its config.json",
            )
        return tuple(names[index] for index in range(self.num_labels))

    @property
    def names_are_generic(self) -> bool:
        """Whether the label names are transformers' placeholders (LABEL_0, LABEL_1, ...)."""
        return self.label_names == tuple(f"LABEL_{index}" for index in range(self.num_labels))

    @property
    def problem_type(self) -> str | None:
        """transformers' name of the task, "token_classification" for a head on tokens; None for a bare encoder."""
        if not self.has_head:
            return None
        if self.tags_tokens:
            return "token_classification"
        declared = self.config.problem_type
        return declared or ("regression" if self.num_labels == 1 else "single_label_classification")

    @property
    def task(self) -> str | None:
        """ "single-label", "multi-label", "regression" or "token"; None for a bare encoder."""
        problem = self.problem_type
        return "token" if self.tags_tokens else None if problem is None else TASK_OF_PROBLEM[problem]

    @property
    def max_tokens(self) -> int:
        """The longest input it accepts, in tokens."""
        longest = int(self.tokenizer.model_max_length)
        positions = max_positions(self.config)
        return longest if positions is None else min(longest, positions)

    @property
    def model_class(self) -> Any:
        """The transformers class that loads it, or None when its class comes with the checkpoint."""
        with suppress(KeyError):
            return self.auto_class._model_mapping[type(self.config)]
        return None

    @property
    def auto_class(self) -> Any:
        """The Auto class of transformers that loads it."""
        return auto_class(self.head)

    @property
    def attention(self) -> str:
        """The attention implementation it runs with: "sdpa" where its class has it, else "eager"."""
        return "sdpa" if getattr(self.model_class, "_supports_sdpa", False) else "eager"

    @cached_property
    def tensor_digest(self) -> str:
        """SHA-256 of its tensors (see `tensor_digest`), looked up when its files were digested before.

        Raises:
            RefusedError: as `load`.
        """
        before = _DigestFile(self)
        digest = before.read()
        if digest is None:
            digest = tensor_digest(self.load("auto"))
            after = _DigestFile(self)
            # Weights that changed under the digest are not remembered; those of the hub arrive while they load.
            if after.key == before.key or not before.has_weights:
                after.write(digest)
        return digest

    @property
    def runs_own_code(self) -> bool:
        """Whether code that comes with the checkpoint takes part; trust alone does not make it."""
        if not self.trust_remote_code:
            return False
        return self.auto_class.__name__ in (getattr(self.config, "auto_map", None) or {}) or any(
            type(part).__module__.startswith("transformers_modules.") for part in (self.config, self.tokenizer)
        )

    def identity(self, tensors: str | None = None) -> dict[str, Any]:
        """What the store keeps as the teacher's identity: tensors, class, the config fields that matter, its code.

        Args:
            tensors: the digest of the tensors, where it is known.
        """
        return {
            "model_type": self.config.model_type,
            "head": self.head,
            "tensors": tensors or self.tensor_digest,
            "config": behaviour_config(self.config),
            **({"code": code_digest(self.folder)} if self.runs_own_code else {}),
        }

    def load(self, dtype: str = "auto") -> nn.Module:
        """The model in evaluation mode on the CPU.

        A model in the checkpoint's own dtype is kept until `unload`, for whoever asks next.

        Args:
            dtype: compute dtype, or "auto" for the checkpoint's own.

        Raises:
            RefusedError: tensors are missing, of another shape, or left over inside the model; unreadable files.
        """
        if self._kept and dtype in ("auto", str(self._kept[0].dtype).removeprefix("torch.")):
            return self._kept[0]
        model = _load(self, dtype)
        if dtype == "auto":
            self._kept[:] = [model]
        return model

    def unload(self) -> None:
        """Let go of the model that `load` keeps."""
        self._kept.clear()


def describe_teacher(source: str, *, trust_remote_code: bool = False) -> Teacher:
    """Read a teacher's config and tokenizer; no weights are read.

    Raises:
        RefusedError: nothing there, no weights, no tokenizer, an adapter without its base, an encoder-decoder, or
            code from the checkpoint without `trust_remote_code`.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(source).expanduser()
    is_local = path.is_dir()
    if is_local:
        _check_files(source, path)
    elif path.is_file():
        raise RefusedError(f"teacher {source} is a file; a teacher is a folder", fix=f"give {path.parent}")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise RefusedError(f"teacher {source} does not exist", fix="give a folder that `from_pretrained` opens")

    where = str(path) if is_local else source
    try:
        folder = path.resolve() if is_local else _hub_folder(source)
        _check_remote_code(source, folder, trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, is_local, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise RefusedError(
            f"teacher {source} is an encoder-decoder ({config.model_type}); kd captures encoders",
            fix="use an encoder checkpoint, such as bert, roberta, deberta or modernbert",
        )
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise RefusedError(f"teacher {source} ({config.model_type}) is no text encoder: its config has no {name}")
    if len(tokenizer) > config.vocab_size:
        raise RefusedError(
            f"teacher {source}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} embeddings",
            fix="put the tokenizer that the model was trained with into the folder",
        )
    architectures = config.architectures or []
    has_head = any(name.endswith((OF_SEQUENCES, OF_TOKENS)) for name in architectures)
    problem = getattr(config, "problem_type", None)
    if has_head and problem is not None and problem not in TASK_OF_PROBLEM:
        raise RefusedError(f"teacher {source}: unknown problem_type {problem!r}{near_match(problem, TASK_OF_PROBLEM)}")
    return Teacher(source, folder, config, tokenizer, has_head, trust_remote_code)


def max_positions(config: Any) -> int | None:
    """The tokens that a model has positions for; None where it sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - ((config.pad_token_id or 0) + 1 if config.model_type in OFFSET_POSITIONS else 0)


def resolve_device(name: str | None) -> str:
    """The device to run on: "cuda" where there is one unless a name is given.

    Raises:
        UsageError: no such kind of device.
        RefusedError: this machine does not have it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        kind = name.split(":")[0]
        raise UsageError(f"unknown device {name!r}{near_match(kind, ('cpu', 'cuda', 'mps', 'xpu'))}") from None
    if device.type == "cpu":
        return "cpu"
    backend: Any = getattr(torch, device.type, None)
    available = hasattr(backend, "is_available") and backend.is_available()
    count = backend.device_count() if available else 0
    if not available or (device.index or 0) >= count:
        raise RefusedError(
            f"device {name!r} is not available here",
            details={f"{device.type} devices": count},
            fix="give --device cpu, or leave --device out",
        )
    return name


def store_identity(teacher: Teacher, *, max_length: int, dtype: str) -> StoreIdentity:
    """Identity of the store that a capture of this teacher belongs to.

    Args:
        max_length: tokens per row asked for; the teacher may take fewer.
        dtype: compute dtype.
    """
    from ...pipeline.store import StoreIdentity

    return StoreIdentity(
        teacher=teacher.identity(),
        tokenizer=tokenizer_identity(teacher.tokenizer),
        capture={
            "max_length": min(max_length, teacher.max_tokens),
            "dtype": dtype,
            "attention": teacher.attention,
            "label_names": teacher.label_names,
            "problem_type": teacher.problem_type,
            **({} if teacher.masking is None else {"masking": teacher.masking.to_json()}),
        },
    )


def require_teacher_of(store: TeacherStore, teacher: Teacher) -> None:
    """RefusedError, field by field, when the teacher is not the one that a store is of."""
    capture = store.identity.capture
    expected = store_identity(teacher, max_length=int(capture["max_length"]), dtype=str(capture["dtype"]))
    store.identity.require_equal(expected, url=store.url)


def auto_class(head: str) -> Any:
    """The Auto class of transformers for a teacher with that head (see `Teacher.head`)."""
    import transformers

    return {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "masked-lm": transformers.AutoModelForMaskedLM,
        "none": transformers.AutoModel,
    }[head]


# --- loading -----------------------------------------------------------------------------------------------------


def _load(teacher: Teacher, dtype: str) -> nn.Module:
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError

    try:
        with _quiet():
            model, info = teacher.auto_class.from_pretrained(
                str(teacher.folder) if Path(teacher.source).expanduser().is_dir() else teacher.source,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=teacher.attention,
                trust_remote_code=teacher.trust_remote_code,
                # Reported below with the other differences instead of as a bare RuntimeError.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UnpicklingError as error:
        raise RefusedError(
            f"teacher {teacher.source} cannot be read: its .bin file holds more than tensors, which may be code",
            fix="save it as safetensors where you trust it: model.save_pretrained(folder)",
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        raise _unreadable(teacher.source, True, error) from error
    if teacher.head == "none":
        info = _without_pooler(model, info)
    _check_loaded(teacher, model, info)
    _check_config(teacher, model)
    ready: nn.Module = model.eval().requires_grad_(False)
    return ready


def _without_pooler(model: nn.Module, info: Mapping[str, Any]) -> dict[str, Any]:
    """A bare encoder may lack a pooler: nothing captured reads it, so it is dropped instead of left at random."""
    missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
    if len(missing) < len(info["missing_keys"]):
        model.pooler = None  # type: ignore[assignment]
    return {**info, "missing_keys": missing}


def _check_loaded(teacher: Teacher, model: nn.Module, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise RefusedError(
            f"teacher {teacher.source} lacks {len(missing)} tensors of {type(model).__name__}, which would be random",
            details=_some(missing),
            fix="fine-tune it first (kd train-teacher --model ...), or give the folder that training wrote",
        )
    mismatched = sorted(
        f"{name}: {tuple(there)} in the checkpoint, {tuple(wanted)} by config.json"
        for name, there, wanted in info["mismatched_keys"]
    )
    if mismatched:
        raise RefusedError(
            f"teacher {teacher.source}: {len(mismatched)} tensors have another shape than config.json says",
            details=_some(mismatched),
            fix="restore the config.json that belongs to these weights",
        )
    left_over = sorted(name for name in info["unexpected_keys"] if _belongs_inside(name, model))
    if left_over:
        raise RefusedError(
            f"teacher {teacher.source}: {len(left_over)} tensors of the checkpoint have no place in the "
            f"{type(model).__name__} that config.json describes",
            details=_some(left_over),
            fix="restore the config.json that belongs to these weights, or merge the adapter into the model",
        )


def _check_config(teacher: Teacher, model: nn.Module) -> None:
    """The files may have changed since they were described; what was loaded must be what the identity says."""
    changed = differing_fields(behaviour_config(teacher.config), behaviour_config(model.config))
    if changed:
        raise RefusedError(
            f"teacher {teacher.source}: its config.json changed while it was in use (then → now)",
            details=changed,
            fix="put the original file back, and run the same command again",
        )


def _belongs_inside(name: str, model: nn.Module) -> bool:
    """Whether an unused tensor of the checkpoint is part of this model (and not, say, of a pretraining head)."""
    parts = name.split(".")
    # BERT's checkpoints carry the head of next-sentence prediction beside the masked-LM head.
    if parts[-1] in COMPUTED_BUFFERS or parts[:2] == ["cls", "seq_relationship"]:
        return False
    if any("lora_" in part or "adapter" in part for part in parts):
        return True
    base = getattr(model, "base_model", model)
    children = {child for child, _ in base.named_children()} | {child for child, _ in model.named_children()}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and parts[0] == prefix and len(parts) > 1:
        parts = parts[1:]
    return parts[0] in children


def _some(lines: Sequence[str], limit: int = 8) -> list[str]:
    return [*lines[:limit], *([f"... and {len(lines) - limit} more"] if len(lines) > limit else [])]


def _check_files(source: str, folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" not in names:
        fix = "give the folder that training wrote"
        if "adapter_config.json" in names:
            fix = "merge the adapter into its base model first (peft: merge_and_unload, save_pretrained)"
        raise RefusedError(f"teacher {source} has no config.json", details=_some(sorted(names)), fix=fix)
    if "adapter_config.json" in names:
        raise RefusedError(
            f"teacher {source} holds an adapter beside a model; kd takes merged weights",
            fix="merge the adapter into its base model first (peft: merge_and_unload, save_pretrained)",
        )
    if not any(name.endswith(WEIGHT_SUFFIXES) for name in names):
        raise RefusedError(
            f"teacher {source} holds no weights (*.safetensors or *.bin)",
            details=_some(sorted(names)),
            fix="give the folder that training wrote",
        )
    # Without its files transformers makes an empty tokenizer and says nothing.
    if not names & TOKENIZER_FILES:
        raise RefusedError(
            f"teacher {source} holds no tokenizer files",
            details=_some(sorted(names)),
            fix="save the tokenizer into the folder: tokenizer.save_pretrained(...)",
        )


def _check_remote_code(source: str, folder: Path, trusted: bool) -> None:
    from transformers import CONFIG_MAPPING

    references = code_references(folder)
    if trusted:
        # What lies elsewhere is not in the digest of the code, and may change without a trace here.
        outside = [name for name in references if not _is_inside(source, folder, name)]
        if outside:
            raise RefusedError(
                f"teacher {source} takes Python code from outside its folder",
                details={"auto_map": ", ".join(outside)},
                fix="put the .py files into the folder, and name them in auto_map as file.Class",
            )
        return
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # AutoConfig says it better
    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        raise RefusedError(
            f"teacher {source} needs Python code that comes with the checkpoint",
            details={"auto_map": raw["auto_map"]},
            fix="read that code; when you trust it, add --trust-remote-code",
        )


def _is_inside(source: str, folder: Path, reference: str) -> bool:
    """Whether an entry of `auto_map` names a file of this very checkpoint."""
    repository, dashes, reference = reference.rpartition("--")
    if dashes and (repository != source or Path(source).is_dir()):
        return False
    parts = reference.partition(".")[0].split("/")
    if not all(part.isidentifier() for part in parts):
        return False
    # Files of a hub checkpoint arrive when they are needed; a folder has them or names something else.
    return not Path(source).expanduser().is_dir() or Path(folder, *parts).with_suffix(".py").is_file()


def _hub_folder(source: str) -> Path:
    from transformers.utils.hub import cached_file

    found = cached_file(source, "config.json")
    assert found is not None
    # `auto_map` may stand in this one too.
    cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    return Path(found).parent


def _unreadable(source: str, is_local: bool, error: Exception) -> RefusedError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not is_local and isinstance(error, OSError):
        return RefusedError(
            f"teacher {source} is no folder here, and the hub does not give it",
            details=[first_line[:300]],
            fix="give a folder, or download it first where the hub can be reached",
        )
    return RefusedError(f"teacher {source} cannot be read", details=[first_line[:300]])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters in them becomes an error of ours."""
    from transformers.utils import logging

    transformers_logging: Any = logging
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# --- digests already known ---------------------------------------------------------------------------------------


class _DigestFile:
    """The tensor digest of a teacher's files as they are now, kept in the user's cache folder.

    Its name is a hash of the path, size, inode and times of every weight and JSON file. A cache that cannot be read
    or written is one that is not there.
    """

    def __init__(self, teacher: Teacher) -> None:
        files = [file for file in sorted(teacher.folder.iterdir()) if file.name.endswith((*WEIGHT_SUFFIXES, ".json"))]
        stats = [(str(file.resolve()), file.stat()) for file in files]
        self.has_weights = any(file.name.endswith(WEIGHT_SUFFIXES) for file in files)
        self.key = fingerprint(
            {
                "format": 1,
                "files": [[path, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for path, s in stats],
                "head": teacher.head,
                # A later version may load the same file under other names.
                "transformers": version("transformers"),
            }
        )
        self._file = user_cache_folder() / "teacher-digests" / f"{self.key}.json"

    def read(self) -> str | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            digest = json.loads(self._file.read_text())["sha256"]
            if isinstance(digest, str) and len(digest) == 64:
                return digest
        return None

    def write(self, digest: str) -> None:
        with suppress(OSError):
            atomic_write_bytes(self._file, json.dumps({"sha256": digest}).encode())
