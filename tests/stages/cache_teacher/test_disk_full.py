"""`kd cache-teacher` on a full disk: one sentence, exit code 5, and the same store and view once there is room."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.cli import main
from kd.pipeline.store import open_store, open_view

Files = Callable[[Path], dict[str, str]]


def run(bench: Any, corpus: str, view: str, capfd: pytest.CaptureFixture[str], limit: int | None) -> tuple[int, Any]:
    """Exit code and result of the command, where no file may have more than `limit` bytes."""
    options = ["--rows-per-shard", "8", "--max-length", "64", "--signals", "logits,hidden.tok@1", "--sidecars", "none"]
    command = ["cache-teacher", "--teacher", str(bench.teacher), "--dataset", corpus, "--text-column", "text"]
    command += ["--label-column", "label", "--store", str(bench.store), "--output-dir", str(bench.folder / view)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        code = main([*command, *options, "--quiet", "--json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return code, json.loads(capfd.readouterr().out)


def test_a_capture_and_a_view_without_room_are_finished_later(
    bench: Any, sentences: list[str], files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = bench.corpus(sentences[:24])
    options = {"rows_per_shard": 8, "signals": "logits,hidden.tok@1", "sidecars": ("none",)}
    whole = bench.capture(corpus, **options, store=str(bench.folder / "whole"), output_dir=str(bench.folder / "v"))

    # The limits let store.json, then the tokenizer, then all but hidden states be written.
    tokenizer = max(f.stat().st_size for f in (bench.folder / "whole" / "sidecars").rglob("*") if f.is_file())
    hidden = (bench.folder / "whole" / "hidden.tok" / "01" / "c" / "0" / "0").stat().st_size
    for limit in (500, tokenizer - 1, min(tokenizer, hidden) - 1):
        code, said = run(bench, corpus, "view", capfd, limit)
        assert code == 5 and said["error"]["type"] == "IncompleteError"
        assert "no space left on the disk of " in said["error"]["what"] and "it resumes" in said["error"]["fix"]
        assert not (bench.folder / "view" / "manifest.json").exists()
    code, said = run(bench, corpus, "view", capfd, None)
    assert (code, said["store_digest"]) == (0, whole.summary["store_digest"])
    assert files(bench.store) == files(bench.folder / "whole")
    assert open_store(bench.store).verify().ok

    size = (bench.folder / "view" / "examples.parquet").stat().st_size
    code, said = run(bench, corpus, "other", capfd, size - 1)
    assert code == 5 and "examples.parquet" in said["error"]["what"]
    assert not (bench.folder / "other").exists()
    assert run(bench, corpus, "other", capfd, None)[0] == 0
    assert len(open_view(bench.folder / "other").examples) == 24
