"""Variants made again from what a corpus says of itself: its originals, their provenance and its manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.artifact import open_artifact
from ...pipeline.errors import RefusedError
from ...pipeline.fingerprint import differing_fields
from ...pipeline.stage import NullProgress
from ..corpus import open_corpus
from .augment import Augment
from .draws import AUG_VERSION
from .generate import FORBIDDEN, ORIGINALS, pools_of, variants_of, write_arrow
from .operators import GENERATORS
from .words import WORDS_VERSION


def regenerate(
    path: Path | str,
    example_ids: Sequence[bytes],
    *,
    wordnet: str | None = None,
    word_table: str | None = None,
    masked_lm: str | None = None,
) -> list[tuple[str, str | None]]:
    """The texts of some variants that rules made, without a look at those that the corpus holds.

    Takes about as long as splitting all originals into words; of a corpus made with a masked LM, that is asked again
    about the originals of these variants and those beside them.

    Args:
        path: folder of a corpus that `kd augment` made.
        example_ids: of variants.
        wordnet, word_table, masked_lm: files that operators read, where they are no longer where they were; their
            content must be the same.

    Raises:
        RefusedError: an id is not of a variant of this corpus, or of one that a model wrote, or the corpus was made by
            another version of kd, another tagger or other files.
    """
    artifact, corpus = open_artifact(path, kind="corpus"), open_corpus(path)
    is_original = corpus.table["parent_id"].is_null()
    originals, variants = (corpus.table.filter(chosen) for chosen in (is_original, pc.invert(is_original)))
    place = {key: row for row, key in enumerate(variants["example_id"].to_pylist())}
    if strangers := [key.hex() for key in example_ids if key not in place]:
        raise RefusedError(f"corpus {path} has no variants with these ids", details=strangers[:5])
    if not example_ids:
        return []
    taken = variants.take(pa.array([place[key] for key in example_ids]))
    if written := {*taken["aug_op"].cast("string").to_pylist()} & {*GENERATORS}:
        raise RefusedError(
            f"a model wrote these variants of corpus {path} ({', '.join(sorted(written))})",
            fix="run the command that made the corpus again, on the kind of device that its manifest names",
        )
    folders = {"wordnet": wordnet, "word_table": word_table, "masked_lm": masked_lm}
    stage = _stage(artifact.manifest, {name: folder for name, folder in folders.items() if folder is not None})
    chosen = taken.select(["parent_id", "aug_iter"]).to_pylist()
    row_of = {key: row for row, key in enumerate(originals["example_id"].to_pylist())}
    with tempfile.TemporaryDirectory(prefix="kd-regenerate-") as folder:
        work = Path(folder)
        write_arrow(originals, work / ORIGINALS)
        (work / FORBIDDEN).touch()
        plan = stage.plan(work, len(originals), info=corpus.info, digest=artifact.fingerprint)
        rows = np.unique([row_of[variant["parent_id"]] for variant in chosen])
        stage.prepare(plan, NullProgress(), {*(rows // plan.rows_per_chunk).tolist()})
        _require_same("words", artifact.content["augmentation"]["pools"]["digest"], pools_of(plan).digest)
        texts: dict[tuple[bytes, int], tuple[str, str | None]] = {}
        for chunk in np.unique(rows // plan.rows_per_chunk).tolist():
            here = rows[rows // plan.rows_per_chunk == chunk] - chunk * plan.rows_per_chunk
            made, _ = variants_of(plan, chunk, [range(row, row + 1) for row in here.tolist()])
            columns = (made[name].to_pylist() for name in ("parent_id", "aug_iter", "text_a", "text_b"))
            for parent, iteration, text_a, text_b in zip(*columns, strict=True):
                texts[parent, iteration] = text_a, text_b
    return [texts[variant["parent_id"], variant["aug_iter"]] for variant in chosen]


def _stage(manifest: Any, folders: dict[str, str]) -> Augment:
    """The stage that made the corpus; RefusedError where it would not make the same now."""
    said = manifest["content"]["augmentation"]
    _require_same("version of the operators", said["aug_version"], AUG_VERSION)
    _require_same("version of the words", said["words_version"], WORDS_VERSION)
    try:
        stage = Augment(**{**manifest["config"], "workers": 1, "cluster": None, **folders})
    except TypeError:
        raise RefusedError("the corpus was made by a version of kd with other options") from None
    _require_same("configuration", said["config_hash"], stage.rules.config_hash.hex())
    _require_same("tagger", said["tagger"], stage.tagger_identity)
    _require_same("files", said.get("files", {}), stage.folder_digests)
    return stage


def _require_same(what: str, said: Any, found: Any) -> None:
    if said != found:
        raise RefusedError(
            f"the variants cannot be made again: the {what} of the corpus is not what is here",
            details=differing_fields({what: said}, {what: found}),
        )
