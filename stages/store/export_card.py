"""The README.md of an export: what `load_dataset` reads from its head, and what people read below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

    from ...pipeline.store import StoreIdentity

ABOUT_COLUMNS = {
    "example_id": "names the example: a hash of its texts",
    "parent_id": "the example that a variant was made from; empty for originals",
    "row_key": "hash of the token ids and segment ids that the teacher read",
    "input_ids": "token ids that the teacher read",
    "labels": "what stood at the masked tokens, in whose order a signal of masked tokens is; -100 elsewhere",
    "token_type_ids": "segment of each token",
    "attention_mask": "ones: rows are not padded",
    "token_ids": "classes with the largest logits, the largest first",
    "top_values": "the raw logits of those classes",
}


def card(
    features: Features,
    splits: Mapping[str, Sequence[str]],
    identity: StoreIdentity,
    signals: Mapping[str, tuple[str, str]],
    num_rows: int,
) -> str:
    """The text of the card.

    Args:
        features: of all splits.
        splits: files by split.
        identity: of the store: teacher, tokenizer and capture.
        signals: column → (signal with its encoding, its largest error).
        num_rows: of all splits.
    """
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    head = DatasetCardData(
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in splits],
            }
        ]
    )
    DatasetInfosDict({"default": DatasetInfo(features=features)}).to_dataset_card_data(head)
    teacher, capture = identity.teacher, identity.capture
    lines = [
        "---",
        "# license: yours to choose; the licences of the texts and of the teacher bind it",
        head.to_yaml().rstrip(),
        "---",
        "",
        "# Outputs of a teacher",
        "",
        f"{num_rows:,} rows of what a teacher said, made by `kd store export`.",
        "Open the folder with `datasets.load_dataset`.",
        "",
        "| column | |",
        "|---|---|",
    ]
    for name in features:
        about = ABOUT_COLUMNS.get(name, "of the corpus")
        if name in signals:
            signal, error = signals[name]
            about = f"`{signal}`; differs from the teacher's number x by at most: {error}".replace("|", "\\|")
        lines.append(f"| `{name}` | {about} |")
    lines += ["", "## Teacher", "", "| | |", "|---|---|"]
    lines += [f"| teacher: {key} | `{_short(value)}` |" for key, value in teacher.items()]
    lines += [f"| tokenizer: {key} | `{_short(value)}` |" for key, value in identity.tokenizer.items()]
    lines += [f"| capture: {key} | `{_short(value)}` |" for key, value in capture.items()]
    lines += ["", "Logits are raw: before any softmax, at no temperature.", ""]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 120 else text[:117] + "..."
