"""Identity: what must be equal for two captures to share a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RefusedError
from ..fingerprint import canonical_json, differing_fields, fingerprint


@dataclass(frozen=True)
class StoreIdentity:
    """Which teacher said it, what it read and how it was run. Paths, times and batch sizes have no place here.

    Attributes:
        teacher: digest of the tensors, architecture and behaviour.
        tokenizer: digest of its behaviour.
        capture: max length, pair template, compute dtype, attention implementation, label names, problem type.
    """

    teacher: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    capture: Mapping[str, Any]

    def __post_init__(self) -> None:
        # Through JSON once: tuples become lists, so that what is written equals what is read back.
        for name in ("teacher", "tokenizer", "capture"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} must be an object, got {getattr(self, name)!r}")
            object.__setattr__(self, name, json.loads(canonical_json(getattr(self, name))))

    @property
    def digest(self) -> str:
        """32 hex digits."""
        return fingerprint(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As in store.json."""
        return {"teacher": self.teacher, "tokenizer": self.tokenizer, "capture": self.capture}

    def require_equal(self, expected: StoreIdentity, *, url: str) -> None:
        """Refuse unless both are equal.

        Raises:
            RefusedError: one line per differing field, the store's value first.
        """
        lines = differing_fields(self.to_json(), expected.to_json())
        if lines:
            raise RefusedError(
                f"store {url} was not captured from this teacher with these settings "
                f"({len(lines)} {'fields differ' if len(lines) > 1 else 'field differs'}; store → asked for)",
                details=lines,
                fix="give another --store, or the teacher and settings that this store was captured with",
            )
