"""The teacher store. Names load when first used: the signal catalogue alone needs no numpy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import Claim
    from .identity import StoreIdentity
    from .inputs import InputRows
    from .keys import row_keys
    from .layout import StoreLayout
    from .plan import format_bytes, parse_bytes, plan_bytes, plan_shards, require_room
    from .reader import StoreReader
    from .records import Problem
    from .signal import SIGNALS, ArraySpec, Signal, array_spec, array_specs, parse_signals
    from .store import Allocation, ShardRows, TeacherStore, create_or_open, open_store
    from .verify import VerifyReport, verify_store
    from .view import View, open_view, write_view
    from .writer import ShardWriter

_HOME = {
    "Allocation": "store",
    "ArraySpec": "signal",
    "Claim": "files",
    "InputRows": "inputs",
    "Problem": "records",
    "SIGNALS": "signal",
    "ShardRows": "store",
    "ShardWriter": "writer",
    "Signal": "signal",
    "StoreIdentity": "identity",
    "StoreLayout": "layout",
    "StoreReader": "reader",
    "TeacherStore": "store",
    "VerifyReport": "verify",
    "View": "view",
    "array_spec": "signal",
    "array_specs": "signal",
    "create_or_open": "store",
    "format_bytes": "plan",
    "open_store": "store",
    "open_view": "view",
    "parse_bytes": "plan",
    "parse_signals": "signal",
    "plan_bytes": "plan",
    "plan_shards": "plan",
    "require_room": "plan",
    "row_keys": "keys",
    "verify_store": "verify",
    "write_view": "view",
}

__all__ = [  # noqa: RUF022 - same order as above
    "Allocation", "ArraySpec", "Claim", "InputRows", "Problem", "SIGNALS", "ShardRows", "ShardWriter", "Signal",
    "StoreIdentity", "StoreLayout", "StoreReader", "TeacherStore", "VerifyReport", "View", "array_spec",
    "array_specs",
    "create_or_open", "format_bytes", "open_store", "open_view", "parse_bytes", "parse_signals", "plan_bytes",
    "plan_shards", "require_room", "row_keys", "verify_store", "write_view",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
