"""Sidecars hold teacher tensors and files as they were given, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import KdError, RefusedError, UsageError, VerificationError
from kd.pipeline.store import TeacherStore, create_or_open, open_store

TENSORS = {
    "embeddings.word_embeddings.weight": np.arange(20, dtype=np.float32).reshape(5, 4),
    "embeddings.LayerNorm.bias": np.zeros(4, dtype=np.float16),
    "position_ids": np.arange(3, dtype=np.int64),
}


@pytest.fixture
def store(tmp_path: Path, identity) -> TeacherStore:
    return create_or_open(tmp_path / "store", identity)


def test_tensors_come_back_with_their_dtypes_and_may_be_changed(store: TeacherStore) -> None:
    assert not store.has_sidecar("embeddings")
    store.put_sidecar("embeddings", TENSORS, {"pad_token_id": 0})
    assert store.has_sidecar("embeddings")
    back = open_store(store.url).sidecar("embeddings")
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)
        back[name] += 1
    assert store.sidecar_metadata("embeddings") == {"pad_token_id": 0}


def test_other_software_reads_the_tensors(store: TeacherStore) -> None:
    from safetensors.numpy import load_file

    store.put_sidecar("embeddings", TENSORS)
    assert load_file(Path(store.url, "sidecars/embeddings/tensors.safetensors")).keys() == TENSORS.keys()


def test_the_same_tensors_again_change_nothing_and_others_are_refused(store, tmp_path: Path, tools) -> None:
    store.put_sidecar("embeddings", TENSORS)
    before, digest = tools.tree(tmp_path), store.digest()
    store.put_sidecar("embeddings", dict(reversed(TENSORS.items())))
    with pytest.raises(RefusedError, match="holds other tensors"):
        store.put_sidecar("embeddings", {**TENSORS, "position_ids": np.arange(1, 4)})
    assert tools.tree(tmp_path) == before and store.digest() == digest


def test_tensors_count_in_the_digest_and_files_do_not(store: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    empty = store.digest()
    store.put_file_sidecar("tokenizer", tmp_path / "tokenizer")  # its bytes depend on library versions
    assert store.digest() == empty
    store.put_sidecar("embeddings", TENSORS)
    assert store.digest() != empty


def test_files_come_back_in_a_folder_and_the_first_ones_stay(store: TeacherStore, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    (source / "sub").mkdir(parents=True)
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "sub" / "sentencepiece.bpe.model").write_bytes(bytes(range(256)))
    store.put_file_sidecar("tokenizer", source, {"class": "BertTokenizer"})
    (source / "tokenizer.json").write_text("written by a newer library")
    store.put_file_sidecar("tokenizer", source)
    folder = open_store(store.url).sidecar_folder("tokenizer")
    assert (folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (folder / "sub" / "sentencepiece.bpe.model").read_bytes() == bytes(range(256))
    assert store.verify().ok


def test_a_sidecar_that_is_not_there_is_refused_with_what_is(store: TeacherStore) -> None:
    store.put_sidecar("embeddings", TENSORS)
    with pytest.raises(RefusedError, match=r"no sidecar 'embedding' \(did you mean 'embeddings'\?\)"):
        store.sidecar("embedding")
    with pytest.raises(RefusedError, match="--sidecars head"):
        store.sidecar("head")
    with pytest.raises(RefusedError, match="holds files, not tensors"):
        Path(store.url, "x").mkdir()
        Path(store.url, "x", "config.json").write_text("{}")
        store.put_file_sidecar("config", Path(store.url, "x"))
        store.sidecar("config")


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden"])
def test_a_name_that_is_not_plain_is_refused(store: TeacherStore, name: str) -> None:
    with pytest.raises(KdError, match=r"no slash|not the name of a file"):
        store.put_sidecar(name, TENSORS)


def test_bad_content_is_refused(store: TeacherStore, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"tensor 'w' has values that are not finite"):
        store.put_sidecar("head", {"w": np.array([1.0, np.nan], dtype=np.float32)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no files in"):
        store.put_file_sidecar("tokenizer", tmp_path / "empty")
    (tmp_path / "empty" / "record.json").write_text("{}")
    with pytest.raises(UsageError, match="which is taken"):
        store.put_file_sidecar("tokenizer", tmp_path / "empty")
    assert store.verify().ok and not Path(store.url, "sidecars").exists()


def test_damaged_tensors_are_refused_when_they_are_read(store: TeacherStore) -> None:
    store.put_sidecar("embeddings", TENSORS)
    path = Path(store.url, "sidecars/embeddings/tensors.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="is damaged"):
        store.sidecar("embeddings")


def test_a_sidecar_of_another_store_is_refused(store: TeacherStore, tmp_path: Path, identity) -> None:
    import shutil
    from dataclasses import replace

    store.put_sidecar("embeddings", TENSORS)
    other = create_or_open(tmp_path / "other", replace(identity, capture={}))
    shutil.copytree(Path(store.url, "sidecars"), Path(other.url, "sidecars"))
    with pytest.raises(KdError, match="belongs to another store"):
        other.sidecar("embeddings")


def test_writing_and_reading_tensors_needs_no_torch(store: TeacherStore) -> None:
    code = (
        "import sys, numpy as np; from kd.pipeline.store import open_store\n"
        f"s = open_store({store.url!r}); s.put_sidecar('e', {{'w': np.zeros(2, 'f4')}}); s.sidecar('e'); s.verify()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
