"""What a store already holds of signals, for the rows of a capture: adding that costs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .choice import Entries, entries_of

if TYPE_CHECKING:
    from ...pipeline.store import Signal, TeacherStore


def already_stored(store: TeacherStore, shards: Iterable[int]) -> dict[Signal, Entries]:
    """Entries that these shards hold of each signal, in the encoding that the store knows it by first."""
    shards = sorted({*shards})
    specs = [spec for spec in store.declared().values() if spec.plain and not spec.part]
    if not specs or not shards:
        return {}
    missing, sizes = store.missing(specs, shards), dict(zip(shards, store.shard_sizes(shards), strict=True))
    found = {}
    for spec in specs:
        holding = [sizes[shard] for shard in shards if spec not in missing.get(shard, ())]
        if holding:
            found[spec.signal] = entries_of(holding)
    return found
