"""Plans pack rows greedily and in order, cost what they say, and are refused when there is no room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.store import StoreLayout, plan
from kd.pipeline.store.plan import format_bytes, parse_bytes, plan_bytes, plan_shards, require_room

lengths_of_rows = st.lists(st.integers(1, 10), max_size=60)
layouts = st.builds(StoreLayout, rows_per_shard=st.integers(1, 8), tokens_per_shard=st.integers(10, 40))


@settings(deadline=None)
@given(lengths_of_rows, layouts)
def test_every_row_has_one_place_and_no_shard_overflows(lengths: list[int], layout: StoreLayout) -> None:
    shards = plan_shards(lengths, layout)
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(len(lengths)))
    for shard in shards:
        assert 1 <= shard.rows <= layout.rows_per_shard
        assert shard.tokens == sum(lengths[shard.start : shard.stop]) <= layout.tokens_per_shard


@settings(deadline=None)
@given(lengths_of_rows, layouts)
def test_a_shard_is_closed_only_when_the_next_row_does_not_fit(lengths: list[int], layout: StoreLayout) -> None:
    for shard in plan_shards(lengths, layout)[:-1]:
        full = shard.rows == layout.rows_per_shard
        assert full or shard.tokens + lengths[shard.stop] > layout.tokens_per_shard


@settings(deadline=None)
@given(lengths_of_rows, layouts, st.integers(0, 10))
def test_planning_the_rest_after_some_shards_gives_the_same_shards(
    lengths: list[int], layout: StoreLayout, done: int
) -> None:
    shards = plan_shards(lengths, layout)
    start = shards[done - 1].stop if 0 < done <= len(shards) else 0
    rest = plan_shards(lengths[start:], layout)
    kept = shards[:done] if start else []
    assert [(s.rows, s.tokens) for s in kept + rest] == [(s.rows, s.tokens) for s in shards]


@pytest.mark.parametrize(("length", "words"), [(0, "row 2 has no tokens"), (65, "row 2 is longer than a shard of 64")])
def test_a_row_that_fits_no_shard_is_named(length: int, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        plan_shards([1, 2, length, 3], StoreLayout(tokens_per_shard=64))


def test_planned_bytes_are_the_bytes_written(make_store, tools) -> None:
    store, *_ = make_store(30)
    shards = range(store.catalogue().num_shards)
    planned = plan_bytes(store.layout, tools.specs, store.shard_sizes(shards))
    written = {signal: said["bytes"] for signal, said in store.inspect()["signals"].items()}
    assert planned == {signal: written[signal] for signal in planned}
    for spec in tools.specs:
        on_disk = sum(path.stat().st_size for path in Path(store.url, spec.path, "c").rglob("*") if path.is_file())
        assert on_disk == planned[str(spec.signal)]


def test_a_plan_over_the_budget_is_refused_with_its_largest_signals(tmp_path: Path) -> None:
    require_room({"logits": 10}, url=tmp_path, max_bytes=10)
    with pytest.raises(RefusedError) as refused:
        require_room({"logits": 5, "hidden.tok@6": 2_000_000}, url=tmp_path / "not" / "yet", max_bytes=1_000_000)
    message = str(refused.value)
    assert "needs 2 MB" in message and "--max-bytes: 1 MB" in message
    assert message.index("hidden.tok@6: 2 MB") < message.index("logits: 5 B")


def test_a_plan_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda url: 1000)
    with pytest.raises(RefusedError, match="free on its disk: 1 KB"):
        require_room(1001, url=tmp_path, max_bytes=5000)
    require_room(1000, url=tmp_path)


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_bytes("10GB") == 10**10
    assert parse_bytes(" 1.5 gib ") == 3 << 29
    assert parse_bytes("12") == parse_bytes(12) == 12
    for text in ("", "GB", "10 parsecs", "-1GB", "1e9"):
        with pytest.raises(UsageError, match="as a size"):
            parse_bytes(text)
    assert [format_bytes(size) for size in (0, 999, 1000, 2_500_000_000)] == ["0 B", "999 B", "1 KB", "2.5 GB"]


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert plan.free_bytes(tmp_path / "a" / "b") > 0
    assert np.isclose(plan.free_bytes(f"file://{tmp_path}"), plan.free_bytes(tmp_path), rtol=0.1)
