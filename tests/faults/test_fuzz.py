"""Every file of a store and of a view, mangled: nothing but errors of kd, no large allocation, no hang.

Two kinds of damage. *Blunt*: bytes are flipped, cut, repeated. *Forged*: the content is edited and everything that
proves it (checksums, digests, names) is made to fit again, as somebody would who means harm. JSON is edited by
hypothesis, so that what it finds comes out small; all else by a seeded generator. `make faults` runs minutes of it, the
tests a few seconds.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import KdError
from kd.pipeline.fingerprint import canonical_json
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import (
    Signal,
    StoreIdentity,
    StoreLayout,
    array_spec,
    array_specs,
    create_or_open,
    open_store,
    open_view,
    write_view,
)

SPECS = (array_spec(Signal("logits"), 3), array_spec(Signal("hidden.tok", 1), 4))
CODES = array_specs(Signal("hidden.tok", 1, "int8"), 4)
ROWS = 12
MEMORY_BYTES = 1 << 30
"""What reading a store of a few kilobytes may reserve at most."""
SECONDS = 10.0
Change = dict[str, bytes | None]
"""File inside the folder → its new bytes; None takes it away."""


def make_scene(folder: Path) -> Path:
    """A store with rows, signals, sidecars and a registered view of it."""
    layout = StoreLayout(rows_per_shard=8, tokens_per_shard=64, chunk_bytes=64)
    identity = StoreIdentity(teacher={"tensors": "0" * 64}, tokenizer={"vocab_size": 9}, capture={"max_length": 8})
    store = create_or_open(folder / "store", identity, layout)
    lengths = np.arange(ROWS) % 5 + 2
    ids = Ragged.from_lengths(np.arange(int(lengths.sum())), lengths)
    rows = store.allocate(ids).rows
    for wanted in (SPECS, CODES):
        for shard, specs in store.missing(store.declare(wanted)).items():
            writer, held = store.writer(shard, specs), store.read_tokens(shard)
            slots = np.arange(len(held.rows))
            for spec in (spec for spec in specs if spec.shape):
                count = len(slots) if spec.axis == "example" else len(held.token_ids.values)
                put = writer.put_rows if spec.axis == "example" else writer.put_tokens
                put(spec.signal, slots, np.ones((count, *spec.shape), dtype=np.float32))
            writer.commit()
    store.put_sidecar("embeddings", {"word": np.ones((2, 3), dtype=np.float32)})
    (folder / "files").mkdir()
    (folder / "files" / "config.json").write_text('{"hidden_size": 4}')
    store.put_file_sidecar("config", folder / "files")
    examples = pa.table({"example_id": [bytes([i]) * 16 for i in range(ROWS)], "text_a": ["a text"] * ROWS})
    content = write_view(folder / "view", examples, rows, store, SPECS, corpus={"info": {"task": "single-label"}})
    write_manifest(folder / "view", {"kind": "view", "fingerprint": "0" * 32, "content": content})
    named = {"name": "a corpus", "fingerprint": "1" * 32}
    store.enter_view("0" * 32, folder / "view", corpus=named, signals=SPECS, num_rows=ROWS, shards=[0, 1])
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield make_scene(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory, scene: Path) -> Path:
    folder = make_scene(tmp_path_factory.mktemp("compacted"))
    open_store(folder / "store").compact()
    return folder


# --- what is done with it ----------------------------------------------------------------------------------------


def use(folder: Path) -> list[str]:
    """Everything that reads; what each said. Whatever is not an error of kd goes through."""
    said = []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except KdError as error:
            said.append(str(error))
            return None

    view = attempt(lambda: open_view(folder / "view"))
    if view is not None:
        attempt(lambda: view.check_coverage(view.signals))
        attempt(lambda: view.examples)
    store = attempt(lambda: open_store(folder / "store"))
    if store is not None:
        everything = [
            store.catalogue, store.declared, store.digest, store.inspect, store.views,
            lambda: store.read_tokens(0),
            lambda: store.missing(SPECS),
            lambda: store.writer(1, SPECS),
            lambda: store.reader().gather("logits", [0, 9]),
            lambda: store.reader().gather_tokens("hidden.tok@1", [0, 9]),
            lambda: store.reader().gather_tokens("hidden.tok@1:int8", [0, 9]),
            lambda: store.lookup(np.zeros((2, 2), dtype=np.uint64)),
            lambda: store.sidecar("embeddings"),
            lambda: store.sidecar_folder("config"),
            lambda: said.extend(map(str, store.verify().problems)),
        ]  # fmt: skip
        for work in everything:
            attempt(work)
    return said


def check(folder: Path, change: Change) -> list[str]:
    """Use the folder with some files changed, under a limit of memory and time; what was said."""
    with changed(folder, change), memory_limit():
        started = time.perf_counter()
        said = use(folder)
        took = time.perf_counter() - started
    assert took < SECONDS, f"{took:.1f} s for {sorted(change)}"
    for text in said:
        # A refused allocation inside a library comes back as an error of kd; it must not have been asked for.
        assert not any(word in text for word in ("Unable to allocate", "malloc of size", "MemoryError")), text
    return said


@contextlib.contextmanager
def changed(folder: Path, change: Change) -> Iterator[None]:
    kept = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in change}
    try:
        write_all(folder, change)
        yield
    finally:
        write_all(folder, kept)


def write_all(folder: Path, change: Change) -> None:
    for name, data in change.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(data)


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- forging: what makes an edited content fit -------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def as_json(content: Any) -> bytes:
    try:
        return canonical_json(content)
    except (ValueError, RecursionError):  # NaN, lone surrogates
        return json.dumps(content).encode("utf-8", "surrogatepass")


def signed(content: Any) -> bytes:
    """With a digest over the rest, where it is an object."""
    if isinstance(content, dict):
        content.pop("digest", None)
        content["digest"] = digest_of(as_json(content))
    return as_json(content)


def records(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_bytes()) for path in sorted((folder / "store/commits").glob("*.json"))}


def renamed_record(name: str, content: Any) -> Change:
    data = as_json(content) + b"\n"
    shard = content.get("shard") if isinstance(content, dict) else None
    number = shard if type(shard) is int and 0 <= shard < 10**8 else 0
    return {f"store/commits/{name}": None, f"store/commits/{number:08d}.{digest_of(data)}.json": data}


def forged_record(folder: Path, name: str, content: Any) -> Change:
    """A record with other content; where it is an allocation, the other records of its shard follow it."""
    change = renamed_record(name, content)
    if "index" in records(folder)[name]:
        new = next(place.split(".")[-2] for place, data in change.items() if data is not None)
        for other, said in records(folder).items():
            if said.get("allocation") == name.split(".")[1]:
                change |= renamed_record(other, said | {"allocation": new})
    return change


def forged_file(folder: Path, file: str, data: bytes) -> Change:
    """A shard file or an index with other bytes, and records that prove them."""
    change: Change = {f"store/{file}": data}
    sums = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    for name, content in records(folder).items():
        for said in [*content["arrays"], content.get("index", {})]:
            if said.get("file") == file:
                said.update(sums | ({"head": xxhash.xxh3_128_hexdigest(data[:4096])} if "head" in said else {}))
                change |= forged_record(folder, name, content)
    return change


def forged_tensors(folder: Path, data: bytes) -> Change:
    place = "store/sidecars/embeddings"
    record = json.loads((folder / place / "record.json").read_bytes())
    record["files"]["tensors.safetensors"] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    return {f"{place}/tensors.safetensors": data, f"{place}/record.json": signed(record) + b"\n"}


def plain(name: str) -> Callable[[Path, Any], Change]:
    return lambda folder, content: {name: as_json(content)}


def with_digest(name: str, end: bytes = b"") -> Callable[[Path, Any], Change]:
    return lambda folder, content: {name: signed(content) + end}


def register_entry(folder: Path, content: Any) -> Change:
    if isinstance(content, dict):
        content.pop("digest", None)
        content["digest"] = digest_of(as_json(content))
    data = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    return {f"store/views/{'0' * 32}.json": data}


def described(name: str) -> Callable[[Path], Any]:
    return lambda folder: json.loads((folder / name).read_bytes())


def a_record(allocation: bool) -> Callable[[Path], Any]:
    def find(folder: Path) -> Any:
        return next(content for content in records(folder).values() if ("index" in content) == allocation)

    return find


def of_record(allocation: bool) -> Callable[[Path, Any], Change]:
    def forge(folder: Path, content: Any) -> Change:
        name = next(name for name, found in records(folder).items() if ("index" in found) == allocation)
        return forged_record(folder, name, content)

    return forge


JSON_FILES: dict[str, tuple[Callable[[Path], Any], Callable[[Path, Any], Change]]] = {
    "store.json": (described("store/store.json"), with_digest("store/store.json")),
    "allocation": (a_record(True), of_record(True)),
    "record": (a_record(False), of_record(False)),
    "group": (described("store/zarr.json"), plain("store/zarr.json")),
    "array": (described("store/logits/zarr.json"), plain("store/logits/zarr.json")),
    "array of scales": (
        described("store/hidden.tok.int8.scale/01/zarr.json"),
        plain("store/hidden.tok.int8.scale/01/zarr.json"),
    ),
    "array of tokens": (described("store/hidden.tok/01/zarr.json"), plain("store/hidden.tok/01/zarr.json")),
    "sidecar of tensors": (
        described("store/sidecars/embeddings/record.json"),
        with_digest("store/sidecars/embeddings/record.json", b"\n"),
    ),
    "sidecar of files": (
        described("store/sidecars/config/record.json"),
        with_digest("store/sidecars/config/record.json", b"\n"),
    ),
    "registered view": (described(f"store/views/{'0' * 32}.json"), register_entry),
    "manifest of the view": (described("view/manifest.json"), plain("view/manifest.json")),
}
"""Name → how to read it, and the changes that put an edited content in its place."""


# --- edits of JSON -----------------------------------------------------------------------------------------------

NASTY = [
    *("", ".", "..", "../../../etc/passwd", "/etc/passwd", "%2e%2e/x", "a\0b", "a\nb", "~", "file:///etc", "\ud800"),
    *("s3://bucket/x", "http://127.0.0.1:9/x", "memory://x", "NaN", "object", "|O", "0" * 32, "float16", "é" * 300),
    *(0, 1, -1, 7, 2**31, 2**31 - 1, 2**32, 2**53, 2**63, 2**64, 10**30, 1 << 5000, 0.5, 1e300),
    *(float("nan"), float("inf"), True, False, None, [], {}, [[]], [[[[[[]]]]]]),
]
VALUES = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(["replace", "remove", "rename", "double", "add", "nest"])
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), KINDS, VALUES), min_size=1, max_size=3)


def slots(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *slots(item)]
    return found


def edited(content: Any, edits: list[tuple[int, str, Any]]) -> Any:
    holder = [copy.deepcopy(content)]
    for number, kind, value in edits:
        places = slots(holder)
        if not places:
            break
        container, key = places[number % len(places)]
        if kind == "replace":
            container[key] = value
        elif kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[str(value)[:20]] = container.pop(key)
        elif kind == "double" and isinstance(container, list) and container is not holder:
            container.append(copy.deepcopy(container[key]))
        elif kind == "add" and isinstance(container, dict):
            container["more"] = value
        elif kind == "nest":
            container[key] = [container[key]]
    return holder[0] if holder else None


def fuzz_json(name: str, folder: Path, examples: int) -> None:
    read, forge = JSON_FILES[name]
    original = read(folder)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 100,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )
    @given(EDITS)
    def run(edits: list[tuple[int, str, Any]]) -> None:
        check(folder, forge(folder, edited(original, edits)))

    run()


# --- edits of bytes ----------------------------------------------------------------------------------------------


def mangled(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, repeated, overwritten; a few times."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not content:
            return b""
        at = rng.randrange(len(content))
        # The ends are where Parquet, safetensors and shard files say how large they are.
        at = rng.choice(
            (at, at, rng.randrange(min(64, len(content))), len(content) - 1 - rng.randrange(min(200, at + 1)))
        )
        kind = rng.randrange(7)
        if kind <= 1:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            content[at : at + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, (1 << 40).to_bytes(8, "little"), b"\x7f" * 4))
        elif kind == 4:
            del content[at : at + rng.choice((1, 4, 100, len(content)))]
        elif kind == 5:
            content[at:at] = content[at : at + rng.choice((1, 8, 64))]
        else:
            content[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
    return bytes(content)


def blunt(folder: Path, rng: random.Random) -> Change:
    """Any one file, nothing else made to fit."""
    files = [path for part in ("store", "view") for path in sorted((folder / part).rglob("*")) if path.is_file()]
    path = rng.choice([path for path in files if path.name != ".lock"])
    return {str(path.relative_to(folder)): mangled(path.read_bytes(), rng)}


def of_file(file: str) -> Callable[[Path, random.Random], Change]:
    return lambda folder, rng: forged_file(folder, file, mangled((folder / "store" / file).read_bytes(), rng))


def tensors(folder: Path, rng: random.Random) -> Change:
    data = (folder / "store/sidecars/embeddings/tensors.safetensors").read_bytes()
    return forged_tensors(folder, mangled(data, rng))


def examples(folder: Path, rng: random.Random) -> Change:
    return {"view/examples.parquet": mangled((folder / "view/examples.parquet").read_bytes(), rng)}


def compacted_records(folder: Path, rng: random.Random) -> Change:
    (path,) = (folder / "store/commits").glob("*.parquet")
    data = mangled(path.read_bytes(), rng)
    return {str(path.relative_to(folder)): None, f"store/commits/{digest_of(data)}.parquet": data}


BYTE_FILES: dict[str, Callable[[Path, random.Random], Change]] = {
    "any file": blunt,
    "row index": of_file("index/00000000.parquet"),
    "shard file of rows": of_file("logits/c/1/0"),
    "shard file of tokens": of_file("hidden.tok/01/c/0/0"),
    "shard file of codes": of_file("hidden.tok.int8/01/c/0/0"),
    "shard file of scales": of_file("hidden.tok.int8.scale/01/c/1"),
    "shard file of ids": of_file("token_ids/c/0"),
    "tensors of a sidecar": tensors,
    "examples of the view": examples,
    "compacted records": compacted_records,
}


def fuzz_bytes(name: str, folder: Path, seeds: range) -> int:
    """How many of the mangled files were noticed."""
    noticed = 0
    for seed in seeds:
        change = BYTE_FILES[name](folder, random.Random(f"{name} {seed}"))
        try:
            noticed += bool(check(folder, change))
        except BaseException:
            print(f"fuzz_bytes({name!r}, seed {seed}): {sorted(change)}")
            raise
    return noticed


def place(name: str, scene: Path, compacted: Path) -> Path:
    return compacted if name == "compacted records" else scene


# --- a few seconds, and minutes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JSON_FILES)
def test_edited_json_is_refused_or_harmless(name: str, scene: Path) -> None:
    assert use(scene) == []
    fuzz_json(name, scene, 6)
    assert use(scene) == []


@pytest.mark.parametrize("name", BYTE_FILES)
def test_mangled_bytes_are_refused_or_harmless(name: str, scene: Path, compacted: Path) -> None:
    folder = place(name, scene, compacted)
    assert use(folder) == []
    assert fuzz_bytes(name, folder, range(8)) > 1
    assert use(folder) == []


@pytest.mark.faults
@pytest.mark.parametrize("name", JSON_FILES)
def test_fuzz_json(name: str, scene: Path, figures: Callable[..., None]) -> None:
    started = time.perf_counter()
    fuzz_json(name, scene, 40)
    figures(f"fuzz of JSON: {name}", inputs=40, seconds=round(time.perf_counter() - started, 1))


@pytest.mark.faults
@pytest.mark.parametrize("name", BYTE_FILES)
def test_fuzz_bytes(name: str, scene: Path, compacted: Path, figures: Callable[..., None]) -> None:
    started = time.perf_counter()
    noticed = fuzz_bytes(name, place(name, scene, compacted), range(1000, 1060))
    figures(f"fuzz of bytes: {name}", inputs=60, noticed=noticed, seconds=round(time.perf_counter() - started, 1))
