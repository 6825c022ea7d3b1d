"""A teacher that classifies tokens: its logits stand per token, and the view says where every word begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.ragged import Ragged
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import Signal, open_view
from kd.stages.derivation import NUM_TOKENS, POSITIONS, derivation_of
from kd.stages.store.audit import AuditStore
from kd.stages.store.plan import PlanStore
from kd.stages.word_pieces import COLUMN, digest, read_first_pieces

OF_WORDS = {"text_column": "words", "label_column": "tags", "max_length": 12}


@pytest.fixture
def tagging(bench: Any, token_teacher: Path, tagged_rows: Any, write_tagged: Callable[..., Path]) -> Any:
    """A bench with a token teacher; `tagging.file` holds forty rows of words and tags."""
    bench.teacher = token_teacher
    bench.file = str(write_tagged(bench.folder / "tagged.parquet", tagged_rows[:40]))
    return bench


def live(folder: Path, words: list[str]) -> tuple[np.ndarray, list[int]]:
    """(logits [T, C], first piece of every word or -1), as transformers gives both for a list of words."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForTokenClassification.from_pretrained(folder)
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.inference_mode():
        logits_TC = model.eval()(**encoded).logits[0].numpy()
    found = encoded.word_ids(0)
    return logits_TC, [found.index(word) if word in found else -1 for word in range(len(words))]


def test_every_token_has_the_teachers_logits_and_every_word_its_first(
    tagging: Any, token_teacher: Path, tagged_rows: Any
) -> None:
    outcome = tagging.capture(tagging.file, **OF_WORDS)
    view = open_view(tagging.folder / "view")
    assert list(map(str, view.signals)) == ["logits.tok:float32"] and outcome.summary["truncated_rows"] > 0
    assert view.store.identity.teacher["head"] == "token-classification"
    assert view.store.identity.capture["label_names"] == ["O", "B-THING", "I-THING"]
    stored, lengths = view.reader.gather_tokens("logits.tok", view.rows)
    pieces = read_first_pieces(view)
    assert (pieces.values == -1).any() and view.info["task"] == "token"
    for row, (words, _) in enumerate(tagged_rows[:40:7]):
        logits_TC, first = live(token_teacher, words)
        np.testing.assert_allclose(stored[7 * row, : lengths[7 * row]], logits_TC, rtol=1e-5, atol=1e-5)
        assert pieces[7 * row].tolist() == first

    # Asked for by its own name it is there already, and another capture has nothing to do.
    again = tagging.capture(tagging.file, **OF_WORDS, signals="logits.tok", output_dir=str(tagging.folder / "again"))
    assert again.summary["rows_computed"] == 0
    store = str(tagging.store)
    audit = execute(AuditStore(store=store, teacher=str(token_teacher), max_rows=8), StageContext())
    assert audit.failure is None


def test_the_head_over_the_last_states_gives_the_same(tagging: Any) -> None:
    tagging.capture(tagging.file, **OF_WORDS, signals="logits,hidden.tok@last:float32", sidecars=("head",))
    view = open_view(tagging.folder / "view")
    wanted, lengths = view.reader.gather_tokens("logits.tok", view.rows)
    states, _ = view.reader.gather_tokens("hidden.tok@2", view.rows)
    assert view.store.has_sidecar("tokens.proof")
    batch = {"hidden.tok@2": torch.from_numpy(states), NUM_TOKENS: torch.from_numpy(lengths)}
    derivation = derivation_of(view.store)
    np.testing.assert_allclose(derivation.of(batch)["logits.tok"].numpy(), wanted, rtol=1e-5, atol=1e-5)

    positions = torch.from_numpy(read_first_pieces(view).to_padded(-1).astype(np.int64))
    at_words = derivation.of({**batch, POSITIONS: positions})["logits.tok"].numpy()
    rows, slots = np.nonzero(positions.numpy() >= 0)
    np.testing.assert_allclose(at_words, wanted[rows, positions[rows, slots]], rtol=1e-5, atol=1e-5)


def test_teachers_and_rows_of_different_kinds_are_refused(
    tagging: Any, tiny_teacher: Path, token_teacher: Path, sentences: list[str]
) -> None:
    plain = tagging.corpus(sentences[:5], "plain")
    with pytest.raises(KdError, match="list of words"):
        tagging.capture(plain)
    with pytest.raises(RefusedError, match=r"no head that classifies tokens, so it gives no logits\.tok"):
        tagging.capture(plain, teacher=str(tiny_teacher), signals="logits.tok")
    with pytest.raises(RefusedError, match=r"is a single-label classifier, and the rows of .* are of a token task"):
        tagging.capture(tagging.file, **OF_WORDS, task="token", teacher=str(tiny_teacher))
    assert not tagging.store.exists()

    tagging.capture(tagging.file, **OF_WORDS)
    with pytest.raises(RefusedError, match=r"no classification head[^\0]*--signals logits\.tok"):
        execute(PlanStore(store=str(tagging.store)), StageContext())
    bare = tagging.folder / "bare"
    from transformers import AutoModel

    AutoModel.from_pretrained(token_teacher).save_pretrained(bare)
    AutoTokenizer.from_pretrained(token_teacher).save_pretrained(bare)
    options = {"teacher": str(bare), "store": str(tagging.folder / "states"), "output_dir": str(tagging.folder / "of")}
    tagging.capture(tagging.file, **OF_WORDS, **options, signals="hidden.cls@last", task="token")
    assert read_first_pieces(open_view(options["output_dir"])) == read_first_pieces(open_view(tagging.folder / "view"))


def test_words_that_do_not_fit_their_rows_are_refused(tagging: Any) -> None:
    tagging.capture(tagging.file, **OF_WORDS)
    folder = tagging.folder / "view"
    whole = [row.tolist() for row in read_first_pieces(open_view(folder))]
    table = pq.read_table(folder / "examples.parquet").drop_columns([COLUMN])
    manifest = json.loads((folder / "manifest.json").read_text())

    def refused(rows: list[list[int]] | None, *, digested: bool = True) -> str:
        column = None if rows is None else pa.array(rows, pa.list_(pa.int16()))
        damaged = table if column is None else table.append_column(COLUMN, column)
        pq.write_table(damaged, folder / "examples.parquet")
        if rows is not None and digested:
            # Whoever changes them may write their digest too: words must fit for themselves.
            manifest["content"][COLUMN] = digest(Ragged.from_rows(rows, np.int16))
            (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(VerificationError) as caught:
            read_first_pieces(open_view(folder))
        return str(caught.value)

    def changed(change: Callable[[list[int]], Any]) -> list[list[int]]:
        rows = [[*row] for row in whole]
        change(rows[3])
        return rows

    impossible = "1 of 40 examples have words that cannot begin where"
    assert "is not the one that was written" in refused(changed(lambda row: row.__setitem__(0, -1)), digested=False)
    assert impossible in refused(changed(lambda row: row.pop()))
    assert impossible in refused(changed(lambda row: row.__setitem__(-1, 12)))
    assert impossible in refused(changed(lambda row: row.__setitem__(1, row[0])))
    assert impossible in refused(changed(lambda row: row.__setitem__(0, -2)))
    assert f"lacks the column {COLUMN}" in refused(None)


def test_what_fewer_bits_do_is_measured_over_tokens(tagging: Any) -> None:
    outcome = tagging.capture(tagging.file, **OF_WORDS, dtype="bfloat16")
    effect = outcome.summary["dtype_effect"]
    assert effect["rows"] == 40 and 0 < effect["difference_max"] < 1 and effect["agreement"] > 0.8


def test_signals_are_named_for_methods_too(tagging: Any) -> None:
    outcome = tagging.capture(tagging.file, **OF_WORDS, signals="hidden.cls@0", for_=("soft-target,fitnets:at=mean",))
    held = {signal.name for signal in open_view(tagging.folder / "view").signals}
    assert "logits.tok" in held and "logits" not in held and outcome.summary["rows_computed"] == 40
    assert Signal("logits.tok").kind.axis == "token"
