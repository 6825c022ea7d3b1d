"""Fingerprints: what made an artifact, as one short hash of canonical JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    NaN and infinity are refused (ValueError), tuples become lists.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: Any) -> str:
    """32 hex digits: BLAKE2b-128 of the canonical JSON of `value`.

    >>> fingerprint({"a": 1, "b": (2,)}) == fingerprint({"b": [2], "a": 1})
    True
    """
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `field: old → new` per field that differs, nested mappings as dotted names, sorted.

    >>> differing_fields({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2 → 3']
    """
    lines: list[str] = []
    for key in sorted({*old, *new}, key=str):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differing_fields(before, after, f"{prefix}{key}.")
        elif before is _ABSENT or after is _ABSENT or canonical_json(before) != canonical_json(after):
            lines.append(f"{prefix}{key}: {_shown(before)} → {_shown(after)}")
    return lines


class _Absent:
    pass


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
