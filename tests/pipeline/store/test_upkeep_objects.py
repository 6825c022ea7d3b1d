"""Compaction, garbage collection and merging of a store on an object store: nothing there knows of local files."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np

from kd.pipeline.artifact import write_manifest
from kd.pipeline.store import create_or_open, open_store
from kd.pipeline.store.gc import collect_garbage
from kd.pipeline.store.merge import merge_stores


def test_upkeep_of_a_store_that_is_made_of_objects(tmp_path: Path, identity, make_store, tools) -> None:
    local, ids, segments, _ = make_store(40)
    base = f"memory://upkeep-{uuid.uuid4().hex}"
    remote = create_or_open(f"{base}/store", identity, tools.layout)
    remote.allocate(ids.take([*range(12)]), segments.take([*range(12)]))
    tools.capture(remote)
    remote.put_sidecar("embeddings", {"word": np.ones(3, dtype=np.float32)})

    digest = remote.digest()
    assert len(remote.compact().written) == 1
    assert open_store(remote.url).digest() == digest

    merge_stores(remote, [local])
    assert open_store(remote.url).inspect()["rows"] == 40
    report = open_store(remote.url).verify()
    assert report.ok and not report.unrecorded
    whole = open_store(remote.url).digest()

    remote.enter_view("ab" * 16, tmp_path / "view", corpus={}, signals=["logits"], num_rows=1, shards=[0])
    (tmp_path / "view").mkdir()
    write_manifest(tmp_path / "view", {"kind": "view", "fingerprint": "ab" * 16})
    garbage = collect_garbage(remote, delete=True)
    assert garbage.kept == (str(tmp_path / "view"),) and len(garbage.files) > 10
    report = open_store(remote.url).verify()
    assert report.ok and not report.unrecorded
    tools.capture(open_store(remote.url))
    assert open_store(remote.url).digest() == whole

    back = create_or_open(tmp_path / "back", identity, tools.layout)
    merge_stores(back, [open_store(remote.url)])
    assert back.digest() == whole
