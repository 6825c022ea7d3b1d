"""A store may come from anywhere: nothing in it leads out of it, makes us allocate, or runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.fingerprint import canonical_json, fingerprint
from kd.pipeline.store import (
    Signal,
    StoreLayout,
    TeacherStore,
    create_or_open,
    files,
    open_store,
    open_view,
    write_view,
)
from kd.pipeline.store import index as index_module
from kd.pipeline.store.compacted import digest_of
from kd.pipeline.store.layout import record_file
from kd.pipeline.store.records import decode_record


@pytest.fixture
def store(make_store) -> TeacherStore:
    store, *_ = make_store(20)
    return store


def forge(store: TeacherStore, change, *, allocation: bool = False, shard: int = 0) -> tuple[str, bytes]:
    """A record with something changed, under a name that fits: (file name, bytes)."""
    record = next(r for r in store.shard_records(shard) if (r.index is not None) == allocation)
    content = json.loads(record.encode())
    change(content)
    data = canonical_json(content) + b"\n"
    number = content["shard"] if isinstance(content["shard"], int) else 0
    return Path(record_file(number, digest_of(data))).name, data


def set_at(*path, value):
    def change(content) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


CHANGES = [
    (set_at("arrays", 0, "file", value="../../../etc/passwd"), "got '../../../etc/passwd'"),
    (set_at("arrays", 0, "file", value="/etc/passwd"), "got '/etc/passwd'"),
    (set_at("arrays", 0, "array", value="../outside"), "no signal lives at"),
    (set_at("arrays", 0, "array", value="logits/../../x"), "no signal lives at"),
    (set_at("arrays", 0, "array", value="logits"), "is logits/c/0/0|entries of shape|got"),
    (set_at("arrays", 0, "shape", value=[1 << 60]), "entries of shape"),
    (set_at("arrays", 0, "shape", value=[-1]), "entries of shape"),
    (set_at("arrays", 0, "shape", value=[1.5]), "list of numbers"),
    (set_at("arrays", 0, "shape", value="3"), "list of numbers"),
    (set_at("arrays", 0, "dtype", value="object"), "cannot be stored as 'object'"),
    (set_at("arrays", 0, "encoding", value="pickle"), "unknown encoding"),
    (set_at("arrays", 0, "bytes", value=1 << 60), "'bytes' must be"),
    (set_at("arrays", 0, "bytes", value=-5), "'bytes' must be"),
    (set_at("arrays", 0, "bytes", value=True), "'bytes' must be"),
    (set_at("arrays", 0, "xxh3_128", value="../" * 10), "32 hex digits"),
    (set_at("arrays", 0, value=7), "must be an object"),
    (set_at("arrays", value=[]), "must be a list of shard files"),
    (set_at("rows", value=1 << 40), "'rows' must be 1 to 8"),
    (set_at("rows", value=0), "'rows' must be 1 to 8"),
    (set_at("tokens", value=65), "'tokens' must be"),
    (set_at("shard", value=10**9), "name is not that of a record|'shard' must be"),
    (set_at("shard", value="0"), "'shard' must be"),
    (set_at("format", value=2), "this kd reads 1"),
    (set_at("store", value="0" * 32), "belongs to another store"),
    (set_at("allocation", value="x"), "32 hex digits"),
    (set_at("extra", value=1), "not written as kd writes records"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_forged_record_is_refused_for_what_is_wrong_with_it(store: TeacherStore, change, words: str) -> None:
    name, data = forge(store, change)
    with pytest.raises(ValueError, match=words):
        decode_record(data, name=name, store=store.store_digest, layout=store.layout)
    Path(store.url, "commits", name).write_bytes(data)
    with pytest.raises(VerificationError, match="is damaged"):
        open_store(store.url).catalogue()
    assert not store.verify().ok


def test_a_forged_allocation_is_refused_for_what_is_wrong_with_it(store: TeacherStore) -> None:
    for change, words in [
        (set_at("index", "file", value="../../x.parquet"), r"got '\.\./\.\./x\.parquet'"),
        (set_at("index", "bytes", value=1 << 50), "'bytes' must be"),
        (set_at("arrays", value=[]), "must be a list"),
        (lambda content: content["arrays"].pop(), "names token_ids and segment_ids, and nothing else"),
    ]:
        name, data = forge(store, change, allocation=True)
        with pytest.raises(ValueError, match=words):
            decode_record(data, name=name, store=store.store_digest, layout=store.layout)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_bytes_that_are_no_record_are_refused(store: TeacherStore, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|must be|object"):
        decode_record(data, name=f"00000000.{digest_of(data)}.json", store=store.store_digest, layout=store.layout)


def test_a_shard_number_far_away_costs_no_memory(store: TeacherStore) -> None:
    def far(content) -> None:
        content["shard"] = 99_999_999
        for array in content["arrays"]:
            array["file"] = array["file"].replace("/c/0", "/c/99999999")

    name, data = forge(store, far)
    Path(store.url, "commits", name).write_bytes(data)
    with pytest.raises(VerificationError, match="allocation is missing"):
        open_store(store.url).catalogue()


def test_a_size_that_lies_is_noticed_before_anything_is_mapped(store: TeacherStore) -> None:
    """A record that names more rows than its files hold, itself well formed."""
    from dataclasses import replace

    allocation = next(r for r in store.shard_records(0) if r.index is not None)
    commit = next(r for r in store.shard_records(0) if r.index is None)
    for record in (allocation, commit):
        Path(store.url, record.file).unlink()
    more = replace(allocation, rows=allocation.rows - 1)
    store.files.create(more.file, more.encode())
    new = replace(commit, rows=more.rows, allocation=more.digest)
    store.files.create(new.file, new.encode())
    with pytest.raises(VerificationError, match=r"rows, its record says"):
        open_store(store.url).reader().gather("logits", [0])


def test_huge_small_files_are_refused_before_they_are_read(store: TeacherStore) -> None:
    def truncate_to(name: str, size: int) -> Path:
        path = Path(store.url, name)
        with open(path, "r+b") as file:
            file.truncate(size)  # sparse
        return path

    truncate_to(store.shard_records(0)[0].file, 1 << 40)
    with pytest.raises(VerificationError, match="at most 1048576 are expected"):
        open_store(store.url).catalogue()
    truncate_to("index/00000001.parquet", 1 << 40)
    assert any("its record says" in problem.what for problem in store.verify().problems)
    truncate_to("store.json", 1 << 40)
    with pytest.raises(VerificationError, match="at most 16777216 are expected"):
        open_store(store.url)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "a//b", "", ".", "..", "a/./b", "a\0b", "a\nb", ".hidden", "~root", "-rf"]
)
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="not the name of a file inside a store"):
        files.open_files(tmp_path).path(name)


@pytest.mark.parametrize("where", ["file", "folder", "store.json", "commits"])
def test_links_lead_nowhere(store: TeacherStore, tmp_path: Path, where: str) -> None:
    root = Path(store.url)
    link = {"file": root / "logits/c/0/0", "folder": root / "logits/c/0"}.get(where, root / where)
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match=r"a link that leads out of its place|damaged"):
        open_store(root).reader().gather("logits", [0])


@pytest.mark.parametrize("link", ["logits", "hidden.tok/02/c", "index", "commits", "sidecars", ".staging", ".lock"])
def test_nothing_is_written_through_a_link_that_leads_out(
    store: TeacherStore, tmp_path: Path, tools, link: str
) -> None:
    outside, place = tmp_path / "outside", Path(store.url, link)
    if place.is_dir():
        place.rename(outside)
    else:
        place.unlink(missing_ok=True)
        outside.mkdir() if link == "sidecars" else outside.write_text("mine")
    if outside.is_dir():
        (outside / "mine").write_text("mine")
    before = tools.tree(tmp_path / "outside") if outside.is_dir() else outside.read_text()
    place.symlink_to(outside)
    with pytest.raises((KdError, OSError)):
        again = create_or_open(store.url, store.identity)
        again.allocate(*tools.make_rows(12, seed=1))
        tools.capture(again)
        again.put_sidecar("embeddings", {"w": np.zeros(2, dtype=np.float32)})
    assert (tools.tree(tmp_path / "outside") if outside.is_dir() else outside.read_text()) == before


def test_a_store_may_itself_stand_behind_a_link(store: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.url)
    assert open_store(tmp_path / "link").verify().ok


@pytest.mark.parametrize("edit", ["[]", "null", "{}", "not json", '{"format": "kd-store", "version": 9}', "\x00"])
def test_a_store_json_that_is_none_is_refused_in_one_sentence(store: TeacherStore, edit: str) -> None:
    Path(store.url, "store.json").write_text(edit)
    with pytest.raises(KdError, match=r"store\.json is not a store description|format version 9"):
        open_store(store.url)


# --- descriptions that would cost time or memory -----------------------------------------------------------------


def test_a_layout_without_divisors_is_no_long_search_and_no_large_index() -> None:
    prime = StoreLayout(tokens_per_shard=2**31 - 1, chunk_bytes=1 << 30)
    started = time.perf_counter()
    assert prime.chunk_length(prime.input_specs[0]) == 1
    with pytest.raises(RefusedError, match="would have 2147483647 inner chunks; 4194304 are the most"):
        prime.num_chunks(prime.input_specs[0])
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("capacity", [1, 2, 12, 97, 4096, 131072, 360360])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000, 1 << 20])
def test_chunks_are_the_largest_that_divide_and_fit(capacity: int, chunk_bytes: int) -> None:
    layout = StoreLayout(tokens_per_shard=capacity, chunk_bytes=chunk_bytes)
    for spec in layout.input_specs:
        fits = max(1, chunk_bytes // spec.entry_bytes)
        expected = max(length for length in range(1, capacity + 1) if capacity % length == 0 and length <= fits)
        assert layout.chunk_length(spec) == expected


def test_empty_slots_of_a_huge_shard_take_no_memory(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "store", identity, StoreLayout(rows_per_shard=1 << 24))
    store.allocate(*tools.make_rows(3))
    index = store.index()
    assert index.token_offsets.nbytes == 4 * (3 + 1)
    assert index.locate(np.arange(3))[2].tolist() == tools.make_rows(3)[0].lengths.tolist()
    for row in (3, 1 << 24, 1 << 40):
        with pytest.raises(RefusedError, match=f"has no row {row}"):
            index.locate(np.array([row]))


def test_an_index_that_would_unfold_is_refused_before_it_does() -> None:
    def index(rows: int, **options: object) -> bytes:
        columns = [pa.array([b"\0" * 16] * rows, pa.binary(16)), *[pa.array([0] * rows, pa.uint32())] * 3]
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=index_module.SCHEMA), buffer, **options)
        return buffer.getvalue()

    # Every byte of the footer: one of them names the codec, and pyarrow ends the process for one that is none.
    plain = index(9, compression="none", use_dictionary=False)
    for at in range(len(plain) - 600, len(plain)):
        with contextlib.suppress(ValueError, pa.ArrowException):
            index_module.decode_index(plain[:at] + bytes([55]) + plain[at + 1 :])
    with pytest.raises(ValueError, match="it is compressed"):
        index_module.decode_index(index(9, compression="zstd", use_dictionary=False))
    with pytest.raises(ValueError, match="is not as kd writes them"):
        index_module.decode_index(index(100_000, compression="none", use_dictionary=True))


# --- where a manifest may lead -----------------------------------------------------------------------------------


@pytest.fixture
def view(store: TeacherStore, tmp_path: Path) -> Path:
    examples = pa.table({"example_id": [bytes([i]) * 16 for i in range(20)]})
    content = write_view(tmp_path / "view", examples, np.arange(20), store, SIGNALS)
    write_manifest(tmp_path / "view", {"kind": "view", "fingerprint": "0" * 32, "content": content})
    return tmp_path / "view"


SIGNALS = (Signal("logits"),)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", "simplecache::http://127.0.0.1:9/store"),
        ("store", "http://127.0.0.1:9/store"),
        ("store", "github://owner:repo@main/store"),
        ("store", "zip://store::file:///tmp/a.zip"),
        ("store", "../store\0"),
        ("store", "../store\n"),
        ("store", 7),
        ("store_identity", None),
        ("signals", "logits"),
        ("signals", [["logits"]]),
        ("corpus", []),
        ("corpus", {"info": 3}),
        ("num_rows", 20.0),
        ("num_rows", True),
        ("num_rows", 1 << 62),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(view: Path, field: str, value: object) -> None:
    manifest = json.loads((view / "manifest.json").read_text())
    manifest["content"][field] = value
    (view / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="the manifest"):
        open_view(view)


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"format": ' + b"9" * 9999 + b"}", b"\xff\xfe", b"[]", b"7"])
def test_a_manifest_that_is_none_is_refused(view: Path, data: bytes) -> None:
    (view / "manifest.json").write_bytes(data)
    with pytest.raises(RefusedError, match="is not"):
        open_view(view)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(view: Path, store: TeacherStore) -> None:
    for file in (view / "manifest.json", Path(store.url) / "store.json"):
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(KdError, match=r"is no file|not a regular file"):
            open_view(view) if "view" in str(file) else open_store(store.url)


def test_a_view_in_a_folder_named_like_a_partition_has_its_own_columns_alone(view: Path) -> None:
    named = view.parent / "task=sst2"
    named.mkdir()
    view.rename(named / "view")
    manifest = json.loads((named / "view" / "manifest.json").read_text())
    manifest["content"]["store"] = "../../store"
    (named / "view" / "manifest.json").write_text(json.dumps(manifest))
    assert open_view(named / "view").examples.column_names == ["example_id", "row", "row_key"]


def test_examples_with_more_rows_than_bytes_are_refused_before_they_are_read(view: Path) -> None:
    count = 2_000_000
    repeated = pa.table(
        {
            "row": pa.array(np.zeros(count, dtype=np.int64)),
            "row_key": pa.array([b"\0" * 16]).take(pa.array(np.zeros(count, dtype=np.int64))).cast(pa.binary(16)),
        }
    )
    pq.write_table(repeated, view / "examples.parquet", compression="zstd")
    assert (view / "examples.parquet").stat().st_size < count
    manifest = json.loads((view / "manifest.json").read_text())
    manifest["content"]["num_rows"] = count
    (view / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=f"says it has {count} rows in [0-9]+ bytes"):
        open_view(view)


def test_a_registered_view_leads_nowhere(store: TeacherStore) -> None:
    def entry(places) -> None:
        name = "1" * 32
        content = {
            "format": 1, "store": store.store_digest, "fingerprint": name, "places": places, "corpus": {},
            "signals": [], "num_rows": 1, "shards": [], "kd_version": "0",
        }  # fmt: skip
        content["digest"] = fingerprint(content)
        Path(store.url, "views").mkdir(exist_ok=True)
        Path(store.url, "views", f"{name}.json").write_bytes(
            json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
        )

    entry([{"path": "/etc\0", "relative": "../\0"}])
    assert [view["there"] for view in store.inspect()["views"]] == [False]
    entry([])
    with pytest.raises(VerificationError, match="it has no place"):
        store.views()


# --- pickles -----------------------------------------------------------------------------------------------------


def test_no_module_of_kd_can_unpickle() -> None:
    """One file reads a pickle: of the tagger's package, by an unpickler that knows two harmless names."""
    import kd

    folder = Path(kd.__file__).parent
    unsafe = re.compile(
        r"\b(?:pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\b|allow_pickle=True|torch\.load|read_pickle"
        r"|(?<![\w.])(?:eval|exec)\(|yaml\.(?:load|full_load|unsafe_load)\b|weights_only=False|trust_remote_code=True"
    )
    checked = 0
    for part in ("pipeline", "stages"):
        for path in sorted((folder / part).rglob("*.py")):
            found = [line for line in path.read_text().splitlines() if unsafe.search(line)]
            name = path.relative_to(folder).as_posix()
            allowed = {
                "stages/augment/tagger.py": ("import pickle", "pickle, so it is read", "(pickle.Unpickler)"),
                "pipeline/settings.py": ("yaml.load(", "Loader=_Loader"),  # a SafeLoader
                "stages/cache_teacher/teacher.py": ("import UnpicklingError",),
            }.get(name, ())
            assert not [line for line in found if not any(word in line for word in allowed)], name
            checked += 1
    assert checked > 60


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_pickles_in_every_place_are_never_opened(store: TeacherStore, view: Path, tmp_path: Path) -> None:
    store.put_sidecar("embeddings", {"w": np.ones(2, dtype=np.float32)})
    mark = tmp_path / "it ran"
    plain = pickle.dumps(_Payload(mark))
    pickle.loads(plain)
    assert mark.exists()
    mark.unlink()
    extension = pa.schema(
        [pa.field("row", pa.int64(), metadata={b"ARROW:extension:name": b"arrow.py_extension_type",
                                               b"ARROW:extension:metadata": plain})])  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(pa.table([pa.array([1])], schema=extension), buffer)
    array = io.BytesIO()
    np.save(array, np.array([_Payload(mark)], dtype=object), allow_pickle=True)
    root = Path(store.url)
    places = [path for folder in (root, view) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(places) > 20
    for place in places:
        kept = place.read_bytes()
        for data in (plain, buffer.getvalue() if place.suffix == ".parquet" else array.getvalue()):
            place.write_bytes(data)
            with contextlib.suppress(KdError):
                opened = open_view(view)
                opened.reader.gather("logits", opened.rows)
                opened.examples  # noqa: B018
            for work in (lambda s: s.sidecar("embeddings"), lambda s: s.read_tokens(0), lambda s: s.verify()):
                with contextlib.suppress(KdError):
                    work(open_store(root))
            assert not mark.exists(), place
        place.write_bytes(kept)
    assert open_store(root).verify().ok
