"""Students from text to weights: options, starts, widths, and what the methods may watch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kd.pipeline.errors import RefusedError, UsageError, VerificationError
from kd.pipeline.store import open_view
from kd.stages.train_student.students import (
    Start,
    Student,
    Task,
    TeacherFacts,
    parse_start,
    parse_student,
    students,
)
from kd.stages.train_student.students.bilstm import BiLstm, word_tokenizer
from kd.stages.train_student.students.bilstm_presets import PRESETS
from kd.stages.train_student.students.starts import (
    read_vectors,
    read_words,
    reduced,
    standardized,
    vector_width,
    words_of_pieces,
)

BUILT = ("tang", "paddle", "inc")
TASK = Task("single-label", ("negative", "neutral", "positive"), pair=False)


def facts(view: Any) -> TeacherFacts:
    import json

    store = open_view(view.path).store
    return TeacherFacts(store, json.loads((store.sidecar_folder("config") / "config.json").read_text()))


def build(
    student: Student,
    start: Start,
    teacher: TeacherFacts,
    texts: list[str] | None = None,
    task: Task = TASK,
    seed: int = 0,
) -> Any:
    student.check(start, teacher, task)
    torch.manual_seed(seed)
    tokenizer = student.make_tokenizer(start, teacher, lambda: texts or [])
    return student.build(start, teacher, task, tokenizer).model.eval(), tokenizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bilstmm", "did you mean 'bilstm'?"),
        ("bilstm:hiden_size=3", "did you mean 'hidden_size'"),
        ("bilstm:units=letters", "expected one of pieces, words"),
        ("bilstm:hidden_size=0", "expected 1 or more"),
        ("bilstm:dropout=1", "expected 0 to below 1"),
        ("bilstm:300", "'300' in the student"),
        ("bilstm:preset=tng", "did you mean 'tang'?"),
        ("bilstm:pooling=median", "expected one of max, mean, last, attention"),
        ("bilstm:max_words=4", "expected 5 or more"),
        ("bilstm:static=true:multichannel=true", "exclude each other"),
        ("bilstm:file_words=10", "--student bilstm:units=words"),
        ("bert:num_layers=two", "expected a whole number"),
        ("bert:num_layers=-1", "'num_layers' of student 'bert' is -1; expected 0 or more"),
        ("bert:dropout=2", "'dropout' of student 'bert' is 2; expected 0 to below 1"),
        ("mobilebert:heads=0", "'heads' of student 'mobilebert' is 0; expected 1 or more"),
    ],
)
def test_a_malformed_student_is_refused_with_help(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_student(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "embedding", "layers", "layers:", "layers:0+1", "layers:1,2", "random:1", "vectors"]
)
def test_a_malformed_start_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_start(text)


@pytest.mark.parametrize("text", ["random", "embeddings", "vectors:some/file:1.parquet", "layers:1+3+5"])
def test_the_written_form_of_a_start_reads_back_as_itself(text: str) -> None:
    assert str(parse_start(text)) == text


def test_a_folder_or_hub_id_is_a_checkpoint(tmp_path: Path) -> None:
    assert parse_student(str(tmp_path)).name == "checkpoint"
    assert parse_student("someone/some-model").name == "checkpoint"


CASES = [
    ("bilstm", "embeddings", False),
    ("bilstm", "random", False),
    ("bilstm:num_layers=2:embedding_size=20:hidden_size=7", "embeddings", False),
    ("bilstm:hidden_size=7", "embeddings", True),
    ("bilstm:multichannel=true:hidden_size=7:pooling=attention", "embeddings", True),
    ("bilstm:embedding_size=40:hidden_size=7:pooling=last", "embeddings", False),
    ("bilstm:units=words:hidden_size=7", "random", False),
    ("bilstm:units=words:hidden_size=7", "embeddings", True),
    ("bert:num_layers=1", "embeddings", False),
    ("bert:hidden_size=16:heads=2:num_layers=2", "embeddings", False),
    ("bert", "layers:2+1", False),
    ("bert:hidden_size=16", "layers:2", True),
    ("bert:num_layers=1:hidden_size=64", "random", True),
    ("mobilebert:num_layers=2:bottleneck_size=16:embedding_size=16", "embeddings", False),
    ("mobilebert:num_layers=1:bottleneck_size=16:hidden_size=24:normalization=no_norm", "random", True),
]


@pytest.mark.parametrize(("text", "start_text", "pair"), CASES)
def test_promised_widths_are_those_of_the_built_model(view: Any, text: str, start_text: str, pair: bool) -> None:
    student, start, teacher = parse_student(text), parse_start(start_text), facts(view)
    task = Task("single-label", TASK.label_names, pair)
    token_widths, sentence_widths = student.widths(start, teacher, task)
    model, tokenizer = build(student, start, teacher, view.texts, task)
    second = view.texts[3:5] if pair else None
    inputs = tokenizer(view.texts[:2], second, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].bool()
    outputs = student.watch(model(**inputs, output_hidden_states=True), mask)
    assert tuple(state.shape[-1] for state in outputs.token_states) == token_widths
    assert tuple(outputs.sentence(layer).shape[-1] for layer in range(len(token_widths))) == sentence_widths
    assert all(state.shape[:2] == mask.shape for state in outputs.token_states)
    assert outputs.logits_BC.shape == (2, 3)
    assert model.config.id2label == dict(enumerate(TASK.label_names))
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize(("text", "start_text", "pair"), CASES)
def test_padding_changes_no_logit_of_any_student(view: Any, text: str, start_text: str, pair: bool) -> None:
    student, teacher = parse_student(text), facts(view)
    task = Task("single-label", TASK.label_names, pair)
    model, tokenizer = build(student, parse_start(start_text), teacher, view.texts, task)
    texts = (view.texts[:3], view.texts[3:6] if pair else None)
    short = tokenizer(*texts, padding=True, return_tensors="pt")
    wide = tokenizer(*texts, padding="max_length", max_length=48, return_tensors="pt")
    torch.testing.assert_close(model(**short).logits, model(**wide).logits, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("text", ["bilstm", "bert", "mobilebert"])
def test_the_seed_settles_a_random_start(view: Any, text: str) -> None:
    teacher = facts(view)
    one, again, other = (build(parse_student(text), Start("random"), teacher, seed=s)[0] for s in (1, 1, 2))
    states = [model.state_dict() for model in (one, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))


def test_the_bilstm_starts_from_the_teachers_standardised_word_table(
    view: Any, teacher_tensors: dict[str, dict[str, np.ndarray]]
) -> None:
    model, _ = build(parse_student("bilstm"), Start("embeddings"), facts(view))
    table = standardized(teacher_tensors["embeddings"]["bert.embeddings.word_embeddings.weight"])
    weight = model.embeddings.weight.detach().numpy()
    assert np.array_equal(weight[1:], table[1:]) and not weight[0].any()
    assert table.std() == pytest.approx(1, abs=1e-5) and np.abs(table.mean(0)).max() < 1e-5


def test_a_narrower_table_keeps_inner_products_as_well_as_any_can() -> None:
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * np.arange(1, 9)
    found = reduced(table, 3)
    values = np.linalg.svd(table, compute_uv=False)
    error = np.linalg.norm(table @ table.T - found @ found.T)
    assert error == pytest.approx(np.sqrt((values[3:] ** 4).sum()), rel=1e-3)
    assert np.array_equal(found, reduced(table, 3))
    np.testing.assert_allclose(reduced(table, 8) @ reduced(table, 8).T, table @ table.T, rtol=1e-3, atol=1e-2)


def test_own_words_start_from_the_mean_of_the_teachers_pieces(view: Any) -> None:
    teacher = facts(view)
    student = parse_student("bilstm:units=words:hidden_size=5")
    model, tokenizer = build(student, Start("embeddings"), teacher, ["the cat zq likes", "[MASK] cat"])
    table = standardized(teacher.word_table())
    rows = {word: model.embeddings.weight[index].detach().numpy() for word, index in tokenizer.get_vocab().items()}
    ids = teacher.tokenizer.convert_tokens_to_ids(["cat", "z", "##q", "[MASK]", "[SEP]"])
    np.testing.assert_allclose(rows["cat"], table[ids[0]], atol=1e-6)
    np.testing.assert_allclose(rows["zq"], table[ids[1:3]].mean(0), atol=1e-6)
    np.testing.assert_allclose(rows["[MASK]"], table[ids[3]], atol=1e-6)
    np.testing.assert_allclose(rows["[SEP]"], table[ids[4]], atol=1e-6)
    assert not rows["[PAD]"].any()


def test_a_wider_student_keeps_the_whole_table_and_starts_the_rest_at_random(view: Any) -> None:
    teacher = facts(view)
    model, _ = build(parse_student("bilstm:embedding_size=40"), Start("embeddings"), teacher)
    weight = model.embeddings.weight.detach().numpy()
    assert np.array_equal(weight[1:, :32], standardized(teacher.word_table())[1:])
    assert np.abs(weight[1:, 32:]).max() <= 0.25 and weight[1:, 32:].std() > 0.1 and not weight[0].any()


def test_both_channels_start_alike_and_one_of_them_is_trained(view: Any) -> None:
    model, _ = build(parse_student("bilstm:multichannel=true:embedding_size=20"), Start("embeddings"), facts(view))
    assert torch.equal(model.static_embeddings.weight, model.embeddings.weight)
    assert model.embeddings.weight.requires_grad and not model.static_embeddings.weight.requires_grad


@pytest.mark.parametrize("name", ["kd", *BUILT])
def test_a_preset_is_what_was_published_but_for_what_is_written_beside_it(name: str) -> None:
    student = parse_student(f"bilstm:preset={name}:hidden_size=9")
    assert isinstance(student, BiLstm) and student.hidden_size == 9
    expected = {**PRESETS[name].options, "hidden_size": 9, "preset": name}
    assert {option: getattr(student, option) for option in expected} == expected
    assert student.training == PRESETS[name].training
    plain = parse_student("bilstm:hidden_size=9")
    others = {field.name for field in dataclasses.fields(BiLstm)} - {*expected}
    assert all(getattr(student, option) == getattr(plain, option) for option in others)


def test_the_presets_have_the_sizes_of_their_sources(view: Any) -> None:
    teacher, start = facts(view), Start("embeddings")
    vocabulary = ["the cat likes rain"]
    sizes = {}
    for name in BUILT:
        model, _ = build(parse_student(f"bilstm:preset={name}"), start, teacher, vocabulary)
        sizes[name] = sum(p.numel() for part, p in model.named_parameters() if "embeddings" not in part)
    # 4 (300 + 300 + 2) weights for each of 300 units and directions, and the like; of three classes.
    assert sizes == {
        "tang": 902_400 + 60_803,
        "paddle": 2 * 4 * 300 * (300 + 300 + 2) + 300 * 601 + 3 * 301,
        "inc": 2 * 4 * 64 * (50 + 64 + 2) + 2 * 4 * 64 * (128 + 64 + 2) + 3 * 129,
    }
    assert parse_student("bilstm:preset=tang").default_start() == start


def test_a_vocabulary_takes_words_of_a_file_after_those_of_the_texts(view: Any, vector_file: Path) -> None:
    teacher, start = facts(view), parse_start(f"vectors:{vector_file}")
    student = parse_student("bilstm:units=words:hidden_size=5:file_words=5")
    model, tokenizer = build(student, start, teacher, ["the cat [MASK]"])
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__) == [
        *("[PAD]", "[UNK]", "[SEP]", "[MASK]", "cat", "the", "likes", "london"),
    ]
    assert tokenizer.convert_ids_to_tokens(tokenizer("The London rain [MASK]")["input_ids"]) == [
        *("the", "london", "[UNK]", "[MASK]"),
    ]
    london = model.embeddings.weight[7].detach().numpy()
    np.testing.assert_allclose(london, standardized(read_vectors(vector_file)[1])[4])
    assert read_words(vector_file, 3) == ["Cat", "the", "likes"]


def test_pieces_that_are_words_start_from_word_vectors(view: Any, vector_file: Path, tmp_path: Path) -> None:
    teacher, start = facts(view), parse_start(f"vectors:{vector_file}")
    model, tokenizer = build(parse_student("bilstm:embedding_size=6"), start, teacher)
    row = model.embeddings.weight[tokenizer.convert_tokens_to_ids("likes")].detach().numpy()
    np.testing.assert_allclose(row[:4], standardized(read_vectors(vector_file)[1])[2])
    (tmp_path / "other.txt").write_text("zzyzx 1 2\nqwrt 3 1\n")
    with pytest.raises(RefusedError, match="none of the"):
        build(parse_student("bilstm"), parse_start(f"vectors:{tmp_path / 'other.txt'}"), teacher)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["[CLS]", "the", "##s", "Cat"], ["[CLS]", "the", "", "Cat"]),
        (["<s>", "\u0120the", "s", "\u0120cat"], ["", "the", "", "cat"]),
        (["<s>", "\u2581the", "s"], ["", "the", ""]),
    ],
)
def test_a_piece_is_a_word_where_it_begins_one(pieces: list[str], words: list[str]) -> None:
    assert words_of_pieces(pieces) == words


def test_pairs_without_a_separator_are_refused_before_training(view: Any) -> None:
    teacher = facts(view)
    teacher.tokenizer.sep_token = None
    pairs = Task("single-label", TASK.label_names, pair=True)
    with pytest.raises(RefusedError, match="no separator token"):
        parse_student("bilstm").check(Start("random"), teacher, pairs)
    parse_student("bilstm:units=words").check(Start("random"), teacher, pairs)


@pytest.fixture(params=["parquet", "text", "word2vec"])
def vector_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    words = ["Cat", "the", "likes", "the", "London"]
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    if request.param == "parquet":
        file = tmp_path / "vectors.parquet"
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)
        pq.write_table(pa.table({"word": words, "vector": column}), file)
        return file
    file = tmp_path / "vectors.txt"
    lines = [f"{word} {' '.join(map(str, row.tolist()))}" for word, row in zip(words, vectors, strict=True)]
    file.write_text("\n".join((["5 4"] if request.param == "word2vec" else []) + lines) + "\n")
    return file


def test_word_vectors_start_the_words_they_know(view: Any, vector_file: Path) -> None:
    teacher = facts(view)
    student = parse_student("bilstm:units=words:hidden_size=5")
    start = parse_start(f"vectors:{vector_file}")
    words, vectors = read_vectors(vector_file)
    assert words == ["Cat", "the", "likes", "the", "London"] and vectors.shape == (5, 4)
    assert vector_width(vector_file) == 4
    assert student.widths(start, teacher, TASK)[0] == (4, 10)
    student.check(start, teacher, TASK)
    tokenizer = student.make_tokenizer(start, teacher, lambda: ["the cat likes rain"])
    built = student.build(start, teacher, TASK, tokenizer)
    table = standardized(vectors)
    row = {word: built.model.embeddings.weight[i].detach().numpy() for word, i in tokenizer.get_vocab().items()}
    np.testing.assert_allclose(row["cat"], table[0])
    np.testing.assert_allclose(row["the"], table[1])
    assert np.abs(row["rain"]).max() <= 0.25
    assert built.start == {"embeddings_from_start": round(3 / 7, 4)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no table of finite numbers"),
        (b"cat 1 2\ndog 1\n", "line 2 has 1 numbers"),
        (b"cat 1 nan\n", "no table of finite numbers"),
        (b"cat one two\n", "cannot be read as text"),
        (b"\xff\xfe cat\n", "cannot be read as text"),
    ],
)
def test_broken_word_vectors_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_bytes(content)
    with pytest.raises(RefusedError, match=words):
        read_vectors(file)
    with pytest.raises(RefusedError, match="no such file"):
        read_vectors(tmp_path / "none.txt")


def test_the_word_tokenizer_keeps_masks_and_orders_equal_counts_by_the_word() -> None:
    texts = ["The film, [MASK] the [MASK] film!", "b a <mask> c"]
    tokenizer = word_tokenizer(texts, min_count=1, max_words=100, max_tokens=16)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert vocabulary == ["[PAD]", "[UNK]", "[SEP]", "[MASK]", "film", "the", "!", ",", "a", "b", "c"]
    ids = tokenizer("[MASK] THE zebra <mask>", "a")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[MASK]", "the", "[UNK]", "[MASK]", "[SEP]", "a"]
    rare = word_tokenizer(texts, min_count=2, max_words=100, max_tokens=16)
    assert set(rare.get_vocab()) == {"[PAD]", "[UNK]", "[SEP]", "[MASK]", "film", "the"}
    assert len(word_tokenizer(texts, min_count=1, max_words=6, max_tokens=16)) == 6


def test_bert_layers_are_the_teachers_blocks_in_the_order_given(
    view: Any, teacher_tensors: dict[str, dict[str, np.ndarray]], tiny_teacher: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = build(parse_student("bert"), parse_start("layers:2+1"), facts(view))
    blocks = teacher_tensors["layers"]
    weight = "attention.self.query.weight"
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for index, layer in enumerate((2, 1)):
        assert np.array_equal(
            state[f"bert.encoder.layer.{index}.{weight}"], blocks[f"bert.encoder.layer.{layer - 1}.{weight}"]
        )
    for name, value in {**teacher_tensors["embeddings"], **teacher_tensors["head"]}.items():
        assert np.array_equal(state[name], value), name
    whole, _ = build(parse_student("bert"), parse_start("layers:1+2"), facts(view))
    teacher = AutoModelForSequenceClassification.from_pretrained(str(tiny_teacher)).eval()
    inputs = tokenizer(view.texts[:4], padding=True, return_tensors="pt")
    torch.testing.assert_close(whole(**inputs).logits, teacher(**inputs).logits)


def test_a_block_of_another_shape_is_refused_not_left_at_random(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = facts(view)
    blocks = teacher.tensors("layers")
    name = next(name for name in blocks if name.endswith("attention.self.query.weight"))
    forged = {**blocks, name: blocks[name][:, 1:]}
    original = type(teacher).tensors
    monkeypatch.setattr(
        type(teacher), "tensors", lambda self, part: forged if part == "layers" else original(self, part)
    )
    with pytest.raises(RefusedError, match=r"query.weight has shape \(32, 31\), the student's \(32, 32\)"):
        build(parse_student("bert"), parse_start("layers:1+2"), teacher)


def test_a_mobilebert_keeps_its_padding_row_at_zero(view: Any) -> None:
    model, _ = build(
        parse_student("mobilebert:embedding_size=16:num_layers=1:bottleneck_size=16"), Start("embeddings"), facts(view)
    )
    table = model.get_input_embeddings()
    assert table.padding_idx == 0 and not table.weight[0].any() and table.weight[5].any()


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        ("bilstm", "layers:1", "cannot start from layers:1"),
        ("bilstm", "vectors:x", "no such file"),
        ("bilstm:static=true", "random", "static=false"),
        ("bilstm:preset=tang", "random", "multichannel=false"),
        ("bilstm:static=true:embedding_size=64", "embeddings", "has width 32"),
        ("bilstm:units=words:file_words=9", "random", "--init vectors:FILE"),
        ("bert", "layers:3", "the teacher has layers 1 to 2"),
        ("bert:num_layers=3", "layers:1", "names 1 layers, and num_layers is 3"),
        ("bert:hidden_size=18", "layers:1", "hidden_size=16 or 20"),
        ("bert:hidden_size=64", "layers:1", "leave hidden_size out"),
        ("bert:hidden_size=16:heads=2", "layers:1", "4 heads as the teacher, not 2"),
        ("bert:intermediate_size=16", "layers:1", "behind an activation nothing can be reduced"),
        ("bert:hidden_size=64", "embeddings", "the teacher's embeddings have 32"),
        ("bert:heads=5", "embeddings", "5 heads do not divide"),
        ("mobilebert:bottleneck_size=30", "random", "4 heads do not divide"),
        ("mobilebert:embedding_size=64", "embeddings", "has width 32"),
        ("mobilebert", "layers:1", "cannot start from layers:1"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(view: Any, text: str, start: str, words: str) -> None:
    with pytest.raises((UsageError, RefusedError)) as error:
        parse_student(text).check(parse_start(start), facts(view), TASK)
    assert words in str(error.value)


def test_a_store_without_the_sidecar_is_refused_with_the_command(
    plant: Callable[..., Any], sentences: list[str]
) -> None:
    teacher = facts(plant(sentences[:4], signals="logits"))
    with pytest.raises(RefusedError, match="--sidecars embeddings,layers"):
        parse_student("bert").check(parse_start("layers:1"), teacher, TASK)


def test_every_student_is_described() -> None:
    entries = {entry["name"]: entry for entry in students.describe()}
    assert set(entries) == {"bert", "bilstm", "mobilebert"}
    assert entries["bilstm"]["options"]["hidden_size"] == 150
    assert all(entry["summary"].endswith(".") and entry["source"] for entry in entries.values())


@pytest.mark.parametrize("shape", [(), (6,), (0, 2), (2, 3), (1, 3, 2)])
def test_a_word_table_of_another_shape_is_refused_whatever_its_checksum_says(shape: tuple[int, ...]) -> None:
    class Store:
        url = "some/store"

        def sidecar(self, name: str) -> dict[str, np.ndarray]:
            return {"bert.embeddings.word_embeddings.weight": np.zeros(shape, np.float32)}

    with pytest.raises(VerificationError, match="is no table of 3 words"):
        TeacherFacts(Store(), {"vocab_size": 3}).word_table()  # type: ignore[arg-type]


def test_words_of_a_token_task_are_one_unit_each_whatever_is_in_them() -> None:
    texts = ["New-York U.S. don't [MASK] x\u00a0y", "new-york wins"]
    tokenizer = word_tokenizer(
        texts, min_count=1, max_words=20, max_tokens=16, further=["per cent", "1,5"], whole_words=True
    )
    assert tokenizer.tokenize(texts[0]) == ["new-york", "u.s.", "don't", "[MASK]", "x\u00a0y"]
    assert tokenizer.tokenize("new-york 1,5 never-seen") == ["new-york", "1,5", "[UNK]"]
    assert "per cent" not in tokenizer.get_vocab()
