"""What makes a teacher the teacher it is: its tensors, the config fields it computes by, its tokenizer, its code.

Everything here ends in store.json, is compared there field by field, and is the same wherever the files lie, however
they are split, and whichever version of transformers saved them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.fingerprint import canonical_json, differing_fields, fingerprint

if TYPE_CHECKING:
    from torch import nn

# Fields of a config that an evaluated model does not read, or that the identity holds elsewhere.
WITHOUT_BEHAVIOUR = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"),
    *("id2label", "label2id", "num_labels", "problem_type", "model_type", "tokenizer_class", "finetuning_task"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "gradient_checkpointing"),
    *("initializer_range", "initializer_factor", "torchscript", "task_specific_params", "quantization_config"),
}
# Named even where they are the default, so that a refusal can show both values.
ALWAYS_NAMED = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("layer_norm_eps", "max_position_embeddings", "type_vocab_size", "pad_token_id"),
}
# Defaults that older checkpoints spell out and today's config classes no longer know.
FORMER_DEFAULTS = {"position_embedding_type": "absolute"}
# Longer values are named by their digest: an error has to show both in one line.
MAX_SHOWN_BYTES = 160

_LONG = "the quick brown fox jumps over the lazy dog and runs away "
PROBES: tuple[tuple[str, str | None], ...] = (
    ("Straße naïve ＡＢＣ 北京 don't 3.14", None),
    ("x\tY\nz  ...", None),
    ("UPPER lower #tag @name http://a.b/c?d=e", None),
    (" leading, trailing ", None),
    ("", None),
    ("is it so?", "It is."),
    ("北京", " two words"),
    (_LONG * 3, None),
    (_LONG * 2, "short"),
    ("short", _LONG * 2),
)
"""Texts and pairs whose token ids tell tokenizers apart; the last three are cut."""
PROBE_TOKENS = 16


def tensor_digest(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter and saved buffer, in order of name.

    Tied tensors count once. File names, sharding and file format do not enter; dtype does, so digest a model in
    the dtype of its checkpoint.
    """
    import torch

    parameters = dict(model.named_parameters())
    every_parameter = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = model.state_dict()
    tensors = parameters | {name: tensor for name, tensor in saved.items() if name not in every_parameter}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def behaviour_config(config: Any) -> dict[str, Any]:
    """The fields of a config that change what an evaluated model computes by: common ones, and all not default.

    Leaving other defaults out keeps the identity equal when a later transformers adds a field.
    """
    defaults = type(config)().to_dict()
    fields = json.loads(config.to_json_string(use_diff=False))
    plain_defaults = FORMER_DEFAULTS | json.loads(json.dumps(defaults, default=str))
    return {
        name: value
        for name, value in sorted(fields.items())
        if name not in WITHOUT_BEHAVIOUR
        and "dropout" not in name
        and not name.startswith("_")
        and (name in ALWAYS_NAMED or name not in plain_defaults or plain_defaults[name] != value)
    }


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What the store keeps as the tokenizer's identity: its behaviour, not its files.

    The parts of its machinery (normaliser, vocabulary, merges, what it puts around one text and around two, ...), where
    it shows them, and the token ids and segment ids that it gives for a few texts and pairs. Truncation and padding
    are set at every call, so what the files say about them does not count.
    """
    return {
        "vocab_size": len(tokenizer),
        "special_tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "segments": "token_type_ids" in tokenizer.model_input_names,
        "truncation_side": tokenizer.truncation_side,
        "vocabulary": fingerprint(sorted(tokenizer.get_vocab().items())),
        **({"machinery": _machinery(tokenizer)} if getattr(tokenizer, "is_fast", False) else {}),
        "probes": fingerprint(_answers(tokenizer)),
    }


def differing_behaviour(said: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """One line per thing that a tokenizer does otherwise than a store's identity says.

    How its parts are written down is left out: that is up to the version of the library.
    """
    found = tokenizer_identity(tokenizer)
    names = ("special_tokens", "vocabulary", "probes")
    return differing_fields({name: said.get(name) for name in names}, {name: found[name] for name in names})


def _machinery(tokenizer: Any) -> dict[str, Any]:
    """The parts of a tokenizer that is written in Rust, as its file describes them."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend.pop("model")
    if isinstance(model.get("vocab"), dict):
        del model["vocab"]  # `vocabulary` holds it, but not the scores that a unigram model lists
    if model.get("merges"):  # older files hold "a b", newer ones ["a", "b"]
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    for name in ("version", "truncation", "padding", "decoder"):
        backend.pop(name, None)
    backend["post_processor"] = _with_readable_templates(backend.get("post_processor"))
    return {name: _shortened(value) for name, value in {**backend, "model": model}.items()}


def _with_readable_templates(processor: Any) -> Any:
    """A post-processor with its templates as people write them: `[CLS]:0 A:0 [SEP]:0`."""
    if not isinstance(processor, dict):
        return processor
    processor = dict(processor)
    for name in ("single", "pair"):
        if isinstance(processor.get(name), list):
            pieces = [piece for entry in processor[name] for piece in entry.values()]
            processor[name] = " ".join(f"{piece['id']}:{piece['type_id']}" for piece in pieces)
    return processor


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return fingerprint(value) if len(canonical_json(value)) > MAX_SHOWN_BYTES else value


def _answers(tokenizer: Any) -> list[Any]:
    """Token ids and segment ids of every probe, whole and cut."""
    # Special tokens written out in a text become special tokens, or do not.
    written_out = [(f"a {token} b", None) for token in sorted({str(t) for t in tokenizer.special_tokens_map.values()})]
    answers = []
    for first, second in (*PROBES, *written_out):
        for limits in ({"truncation": False, "verbose": False}, {"truncation": True, "max_length": PROBE_TOKENS}):
            encoded = tokenizer(first, second, padding=False, **limits)
            answers.append([list(encoded["input_ids"]), list(encoded.get("token_type_ids", []))])
    return answers


# --- code that comes with a checkpoint ---------------------------------------------------------------------------


def code_references(folder: Path) -> list[str]:
    """What `auto_map` names in the config and in the tokenizer's config of a checkpoint: `file.Class` each."""
    references: list[str] = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # transformers says it better
        references += _strings(auto_map)
    return sorted(set(references))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def code_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all Python files below a folder, those in sub-folders included."""
    digest = hashlib.sha256()
    for name, path in sorted(_python_files(folder, set())):
        content = path.read_bytes()
        digest.update(f"{name.removeprefix(f'{folder}/')} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _python_files(folder: Path, seen: set[str]) -> Iterator[tuple[str, Path]]:
    # Links are followed, as an import does; `seen` keeps a circle of them finite.
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _python_files(entry, seen)
        elif entry.suffix == ".py" and entry.is_file():
            yield str(entry), entry
