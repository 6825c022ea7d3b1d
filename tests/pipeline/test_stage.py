"""Skip, refuse, resume and overwrite: what `execute` decides, and that a manifest is the only proof of success."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from kd.pipeline.artifact import open_artifact
from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import Stage, StageContext, StageResult, execute, option


@dataclass(frozen=True, kw_only=True)
class Count(Stage):
    command: ClassVar[str] = "count"
    kind: ClassVar[str] = "corpus"

    limit: int = option(3, help="how far")
    workers: int = option(1, help="how many at once", identity=False)
    source: str | None = option(None, help="a file read", identity=True)
    output_dir: str = option(help="where")

    def inputs(self) -> dict[str, str]:
        return {"source": Path(self.source).read_text()} if self.source else {}

    def run(self, context: StageContext) -> StageResult:
        if self.limit < 0:
            raise RefusedError(f"limit is {self.limit}")
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "calls").open("a") as calls:
            calls.write("x")
        return StageResult(summary={"limit": self.limit}, content={"limit": self.limit})


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text())


def test_a_finished_stage_is_skipped_and_keeps_its_summary(tmp_path: Path) -> None:
    first = execute(Count(output_dir=str(tmp_path / "a")))
    second = execute(Count(output_dir=str(tmp_path / "a")))
    assert (first.skipped, second.skipped) == (False, True)
    assert second.summary == first.summary
    assert calls(tmp_path / "a") == 1


def test_a_field_that_does_not_change_the_result_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    assert execute(Count(output_dir=str(tmp_path / "a"), workers=7)).skipped


def test_other_settings_in_the_same_folder_are_refused_with_the_differing_fields(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    with pytest.raises(RefusedError, match=r"config\.limit: 3 → 4") as caught:
        execute(Count(output_dir=str(tmp_path / "a"), limit=4))
    assert "--overwrite" in str(caught.value)
    assert calls(tmp_path / "a") == 1


def test_overwrite_replaces_the_old_artifact(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    (tmp_path / "a" / "stale").write_text("old")
    execute(Count(output_dir=str(tmp_path / "a"), limit=4), StageContext(overwrite=True))
    assert open_artifact(tmp_path / "a", kind="corpus").content["limit"] == 4
    assert not (tmp_path / "a" / "stale").exists()


def test_overwrite_never_deletes_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(RefusedError, match="not a finished artifact"):
        execute(Count(output_dir=str(tmp_path / "home")), StageContext(overwrite=True))
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_input_is_known_by_its_fingerprint_not_its_path(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("same")
    (tmp_path / "two").write_text("same")
    execute(Count(output_dir=str(tmp_path / "a"), source=str(tmp_path / "one")))
    assert execute(Count(output_dir=str(tmp_path / "a"), source=str(tmp_path / "two"))).skipped
    (tmp_path / "two").write_text("other")
    with pytest.raises(RefusedError, match=r"inputs\.source"):
        execute(Count(output_dir=str(tmp_path / "a"), source=str(tmp_path / "two")))


def test_a_failed_stage_leaves_no_manifest_and_can_run_again(tmp_path: Path) -> None:
    with pytest.raises(RefusedError):
        execute(Count(output_dir=str(tmp_path / "a"), limit=-1))
    with pytest.raises(RefusedError, match="does not exist|has not finished"):
        open_artifact(tmp_path / "a")
    assert not execute(Count(output_dir=str(tmp_path / "a"))).skipped


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": 99, "kind": "corpus", "fingerprint": "x"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_named_and_never_trusted(tmp_path: Path, damage: bytes) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    (tmp_path / "a" / "manifest.json").write_bytes(damage)
    with pytest.raises(RefusedError, match=r"manifest"):
        execute(Count(output_dir=str(tmp_path / "a")))


def test_opening_an_artifact_of_another_kind_names_both_kinds(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    with pytest.raises(RefusedError, match="is a corpus, not a teacher"):
        open_artifact(tmp_path / "a", kind="teacher")


def test_the_manifest_records_configuration_inputs_and_summary(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a"), workers=2))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["config"]["workers"] == 2
    assert "workers" not in manifest["identity"]["config"]
    assert manifest["summary"]["limit"] == 3
    assert manifest["stage"] == "count"
