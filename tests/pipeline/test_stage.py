"""Skip, refuse, resume and overwrite: what `execute` decides, and that a manifest is the only proof of success."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from kd.pipeline import stage as stage_module
from kd.pipeline.artifact import open_artifact
from kd.pipeline.errors import IncompleteError, RefusedError
from kd.pipeline.stage import UNFINISHED, Stage, StageContext, StageResult, execute, option


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
        with (folder / "calls").open("a") as calls:
            calls.write("x")
        if self.limit >= 100:
            raise RefusedError(f"limit is {self.limit}, too late")
        if self.limit >= 50:
            return StageResult(summary={"limit": self.limit}, failure=IncompleteError("half of it"))
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
    with pytest.raises(RefusedError, match="not a finished or unfinished"):
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
    with pytest.raises(RefusedError, match=r"does not exist|has not finished"):
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


def test_a_stage_that_fails_before_it_wrote_anything_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="limit is -1"):
        execute(Count(output_dir=str(tmp_path / "a"), limit=-1))
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_is_continued_by_the_same_settings_and_refused_by_others(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="too late"):
        execute(Count(output_dir=str(tmp_path / "a"), limit=100))
    assert (tmp_path / "a" / UNFINISHED).exists()
    with pytest.raises(RefusedError, match=r"interrupted corpus with other settings\n  config\.limit: 100 → 3"):
        execute(Count(output_dir=str(tmp_path / "a")))
    with pytest.raises(RefusedError, match="too late"):
        execute(Count(output_dir=str(tmp_path / "a"), limit=100))
    assert calls(tmp_path / "a") == 2
    execute(Count(output_dir=str(tmp_path / "a")), StageContext(overwrite_changed=True))
    assert calls(tmp_path / "a") == 1
    assert not (tmp_path / "a" / UNFINISHED).exists()


def test_a_damaged_marker_is_not_mistaken_for_the_same_work(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / UNFINISHED).write_text("{")
    (tmp_path / "a" / "half").write_text("x")
    with pytest.raises(RefusedError, match="damaged"):
        execute(Count(output_dir=str(tmp_path / "a")))


def test_a_folder_that_another_process_works_in_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twice(Count):
        def run(self, context: StageContext) -> StageResult:
            for context_again in (StageContext(), StageContext(overwrite=True), StageContext(overwrite_changed=True)):
                (Path(self.output_dir) / "work").write_text("mine")
                with pytest.raises(RefusedError, match="another process is working"):
                    execute(Count(output_dir=self.output_dir, limit=4), context_again)
            return super().run(context)

    execute(Twice(output_dir=str(tmp_path / "a")))
    assert (tmp_path / "a" / "work").read_text() == "mine"


def test_overwrite_changed_replaces_only_what_other_settings_made_and_says_what_differed(tmp_path: Path) -> None:
    context = StageContext(overwrite_changed=True)
    execute(Count(output_dir=str(tmp_path / "a")), context)
    assert execute(Count(output_dir=str(tmp_path / "a")), context).skipped
    outcome = execute(Count(output_dir=str(tmp_path / "a"), limit=4), context)
    assert outcome.changed == ("config.limit: 3 → 4",)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_old_artifact_is_kept_until_the_new_one_is_complete_and_comes_back_with_its_settings(
    tmp_path: Path,
) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    with pytest.raises(RefusedError, match="too late"):
        execute(Count(output_dir=str(tmp_path / "a"), limit=100), StageContext(overwrite_changed=True))
    assert open_artifact(tmp_path / "a.replaced").content["limit"] == 3
    assert execute(Count(output_dir=str(tmp_path / "a"))).skipped
    assert open_artifact(tmp_path / "a").content["limit"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_store_is_never_deleted_with_an_artifact(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    (tmp_path / "a" / "inner" / "store").mkdir(parents=True)
    (tmp_path / "a" / "inner" / "store" / "store.json").write_text("{}")
    for context in (StageContext(overwrite=True), StageContext(overwrite_changed=True)):
        with pytest.raises(RefusedError, match="never deletes a store"):
            execute(Count(output_dir=str(tmp_path / "a"), limit=4), context)
    assert (tmp_path / "a" / "inner" / "store" / "store.json").exists()


def test_someone_elses_folder_in_the_place_of_the_replaced_one_is_not_deleted(tmp_path: Path) -> None:
    execute(Count(output_dir=str(tmp_path / "a")))
    (tmp_path / "a.replaced").mkdir()
    (tmp_path / "a.replaced" / "thesis.tex").write_text("years of work")
    with pytest.raises(RefusedError, match="not an artifact of kd"):
        execute(Count(output_dir=str(tmp_path / "a"), limit=4), StageContext(overwrite=True))
    assert (tmp_path / "a.replaced" / "thesis.tex").exists()
    assert execute(Count(output_dir=str(tmp_path / "a"))).skipped


def test_a_result_with_a_failure_keeps_its_summary_and_gets_no_manifest(tmp_path: Path) -> None:
    outcome = execute(Count(output_dir=str(tmp_path / "a"), limit=50))
    assert (outcome.summary["limit"], str(outcome.failure)) == (50, "half of it")
    with pytest.raises(RefusedError, match="has not finished"):
        open_artifact(tmp_path / "a")


def test_a_summary_with_nan_does_not_cost_the_artifact(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Count):
        def run(self, context: StageContext) -> StageResult:
            return StageResult(summary={"pearson": float("nan")}, content={"scores": (float("inf"), 1.0)})

    first = execute(Odd(output_dir=str(tmp_path / "a")))
    assert first.artifact is not None and first.artifact.content == {"scores": [None, 1.0]}
    assert execute(Odd(output_dir=str(tmp_path / "a"))).summary == first.summary


def test_a_kill_amid_deleting_a_replaced_artifact_leaves_nothing_that_is_refused(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "a"
    execute(Count(limit=1, output_dir=str(folder)))

    def die_halfway(path: Path, **options: object) -> None:
        if Path(path).exists():
            (Path(path) / "manifest.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die_halfway)
        with pytest.raises(KeyboardInterrupt):
            execute(Count(limit=2, output_dir=str(folder)), StageContext(overwrite=True))
    for limit in (3, 4):
        execute(Count(limit=limit, output_dir=str(folder)), StageContext(overwrite=True))
    assert open_artifact(folder).content["limit"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_artifact_that_another_process_has_moved_meanwhile_is_not_moved_again(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "a"
    execute(Count(limit=1, output_dir=str(folder)))
    real = stage_module._differences

    def meanwhile(*args: object) -> tuple[str, ...]:
        # The same command elsewhere: moves the old artifact aside and begins.
        folder.rename(tmp_path / "a.replaced")
        folder.mkdir()
        (folder / UNFINISHED).write_text("{}")
        return real(*args)

    monkeypatch.setattr(stage_module, "_differences", meanwhile)
    with pytest.raises(RefusedError, match="another process is working"):
        execute(Count(limit=2, output_dir=str(folder)), StageContext(overwrite=True))
    assert open_artifact(tmp_path / "a.replaced").content["limit"] == 1
    assert (folder / UNFINISHED).read_text() == "{}"
