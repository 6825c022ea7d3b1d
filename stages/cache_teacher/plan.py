"""What a capture will do, and what it costs: known before anything is written, and told by `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...pipeline.ragged import Ragged
    from ...pipeline.store import ArraySpec, InputRows, Signal, StoreLayout, TeacherStore
    from ...pipeline.store.plan import ShardSize
    from ...pipeline.store.store import AllocationPreview
    from .teacher import Teacher


@dataclass(frozen=True)
class Plan:
    """What a capture will do, known before anything is written.

    Attributes:
        url: of the store.
        store: None when it is to be made.
        layout: the store's own, or the one it will get.
        inputs: the corpus as the teacher reads it.
        num_truncated: rows of it that were cut.
        preview: which rows are new, and the shards they will take.
        signals: what is to be stored, as it was asked for or chosen.
        specs: their arrays.
        missing: shards that are there and hold a row of the corpus → signals they lack.
        missing_sizes: of those shards.
        recoded: those of them that the teacher need not run over: the store holds float32 of all that they lack.
        sidecars: to be added.
        teacher: whose tensors the sidecars hold.
        max_bytes: the budget; None is the free disk.
        first_pieces: which token every word of a token task begins with; None for other tasks.
    """

    url: str
    store: TeacherStore | None
    layout: StoreLayout
    inputs: InputRows
    num_truncated: int
    preview: AllocationPreview
    signals: tuple[Signal, ...]
    specs: tuple[ArraySpec, ...]
    missing: Mapping[int, tuple[ArraySpec, ...]]
    missing_sizes: Sequence[ShardSize]
    recoded: frozenset[int]
    sidecars: tuple[str, ...]
    teacher: Teacher
    max_bytes: int | None
    first_pieces: Ragged | None = None

    @cached_property
    def _sizes_to_compute(self) -> list[ShardSize]:
        sizes = zip(self.missing, self.missing_sizes, strict=True)
        return [*self.preview.sizes, *(size for shard, size in sizes if shard not in self.recoded)]

    def typical_rows(self) -> tuple[Ragged, Ragged]:
        """Token and segment ids of some rows like those to be computed."""
        if self.preview.num_new or self.store is None:
            return self.inputs.first_step()
        rows = self.store.read_tokens(next(shard for shard in self.missing if shard not in self.recoded))
        return rows.token_ids, rows.segment_ids

    @property
    def shards_to_compute(self) -> int:
        return len(self._sizes_to_compute)

    @property
    def rows_to_compute(self) -> int:
        return sum(shard.rows for shard in self._sizes_to_compute)

    @property
    def tokens_to_compute(self) -> int:
        return sum(shard.tokens for shard in self._sizes_to_compute)

    @cached_property
    def bytes_of(self) -> dict[str, int]:
        """Bytes that will be written, by signal, sidecar and index; exact but for the index."""
        from ...pipeline.store import plan_bytes
        from ...pipeline.store.plan import INDEX_BYTES_PER_ROW
        from .sidecars import sidecar_bytes

        sizes = plan_bytes(self.layout, (*self.layout.input_specs, *self.specs), self.preview.sizes)
        for specs, size in zip(self.missing.values(), self.missing_sizes, strict=True):
            for name, size_bytes in plan_bytes(self.layout, specs, [size]).items():
                sizes[name] += size_bytes
        per_row = INDEX_BYTES_PER_ROW + (4 if self.layout.pairs_per_shard else 0)
        sizes["index"] = per_row * self.preview.num_new
        if self.sidecars:
            sizes |= {f"sidecar {name}": size for name, size in sidecar_bytes(self.teacher, self.sidecars).items()}
        return sizes

    @property
    def bytes_text(self) -> str:
        from ...pipeline.store import format_bytes

        return format_bytes(sum(self.bytes_of.values()))

    def figures(self, tokens_per_s: float | None) -> dict[str, Any]:
        """Rows, tokens, bytes and time as numbers; `tokens_per_s` of the teacher, None where it need not run."""
        from ...pipeline.store.plan import free_bytes

        seconds = 0.0 if tokens_per_s is None else self.tokens_to_compute / tokens_per_s
        num_new, num_known = self.preview.num_new, self.preview.num_known
        return {
            "rows": self.inputs.num_rows,
            "rows_new": num_new,
            "rows_known": num_known,
            "duplicates": self.inputs.num_rows - num_new - num_known,
            "truncated_rows": self.num_truncated,
            "rows_to_compute": self.rows_to_compute,
            "tokens_to_compute": self.tokens_to_compute,
            "shards_to_compute": self.shards_to_compute,
            "bytes_by_signal": self.bytes_of,
            "bytes_total": sum(self.bytes_of.values()),
            "free_bytes": free_bytes(self.url),
            "estimated_seconds": round(seconds, 1),
            "estimated_rows_per_s": round(self.rows_to_compute / seconds, 1) if seconds else None,
        }

    def require_room(self) -> None:
        """RefusedError when it is larger than the budget or the free disk."""
        from ...pipeline.store import require_room

        require_room(self.bytes_of, url=self.url, max_bytes=self.max_bytes)


def recoded_shards(store: TeacherStore, missing: Mapping[int, Sequence[ArraySpec]]) -> frozenset[int]:
    from ...pipeline.store.recode import recodable

    catalogue = store.catalogue()
    return frozenset(
        shard
        for shard, specs in missing.items()
        if recodable(catalogue, shard, specs).keys() == {spec.signal for spec in specs}
    )


def plan_table(figures: Mapping[str, Any], *, store: str, max_tokens: int) -> str:
    """`Plan.figures` with what was `chosen` (None: nothing), for people."""
    from ...pipeline.store import format_bytes

    bytes_of, free = figures["bytes_by_signal"], figures["free_bytes"]
    width = max(map(len, (*bytes_of, "in all, of")), default=0)
    lines = [
        f"cache-teacher --dry-run: nothing was written (store {store})",
        f"  rows     {figures['rows']}: {figures['rows_new']} new, {figures['rows_known']} known, "
        f"{figures['duplicates']} duplicates, {figures['truncated_rows']} cut at {max_tokens} tokens",
        f"  compute  {figures['rows_to_compute']} rows, {figures['tokens_to_compute']} tokens "
        f"in {figures['shards_to_compute']} shards",
        f"  time     about {figures['estimated_seconds']} s"
        + (f" ({figures['estimated_rows_per_s']} rows/s)" if figures["estimated_rows_per_s"] else ""),
        *_choice_lines(figures["chosen"]),
        "  bytes",
        *(f"    {name:<{width}}  {format_bytes(size):>8}" for name, size in bytes_of.items()),
        f"    {'in all':<{width}}  {format_bytes(figures['bytes_total']):>8}  "
        + ("" if free is None else f"({format_bytes(free)} free)"),
    ]
    return "\n".join(lines)


def _choice_lines(chosen: Mapping[str, Any] | None) -> list[str]:
    if chosen is None:
        return []
    lines = [
        f"  chosen   for {', '.join(chosen['for'])}",
        f"    --signals {chosen['signals']} --sidecars {','.join(chosen['sidecars']) or 'none'}",
    ]
    for what, text in (
        ("already stored", ", ".join(chosen["already_stored"])),
        ("derived", chosen["derived"]),
        ("also possible", ", ".join(chosen["also_possible"])),
    ):
        lines += [f"    {what}: {text}"] if text else []
    return lines
