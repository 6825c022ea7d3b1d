"""What makes another teacher, and what does not: one change a row, all against one finished store and view.

A row of `REFUSED` makes the same command fail, with the field that differs named with both values, and leaves every
file of store and view as it was. A row of `HARMLESS` leaves the command with nothing to do.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.fingerprint import fingerprint
from kd.pipeline.stage import execute
from kd.pipeline.store import StoreIdentity, create_or_open, open_store, open_view
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.cache_teacher import teacher as teacher_module
from kd.stages.cache_teacher.identity import tokenizer_identity
from kd.stages.cache_teacher.teacher import Teacher, describe_teacher, store_identity

TEXTS = ["the cat likes the book", "a dog sees two bright stars, and everyone laughs at it", "my old friend reads"]
Files = Callable[[Path], dict[str, str]]


@dataclass
class Scene:
    """The finished work, and a copy of the teacher to change.

    Attributes:
        folder: of this row.
        teacher: a copy of the captured teacher.
        options: of the command that made store and view; a row changes them too.
    """

    folder: Path
    teacher: Path
    options: dict[str, Any]
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def patch(self, target: Any, name: str, value: Any) -> None:
        patch = self.cleanup.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(target, name, value)

    def json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        file = self.teacher / name
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def config(self, **changes: Any) -> None:
        self.json("config.json", lambda config: config.update(changes))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        file = self.teacher / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def run(self) -> Any:
        return execute(CacheTeacher(**self.options))

    @property
    def store(self) -> Path:
        return Path(self.options["store"])


def corpus(folder: Path, texts: list[str]) -> str:
    with (folder / "texts.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    return str(folder / "texts.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    """One captured store and its view: the options of the command that made them."""
    folder = tmp_path_factory.mktemp("finished")
    options = {
        "teacher": str(shutil.copytree(tiny_teacher, folder / "teacher")),
        "dataset": corpus(folder, TEXTS),
        "text_column": "text",
        "store": str(folder / "store"),
        "signals": "hidden.cls@1",
        "max_length": 12,
        "sidecars": ("none",),
        "output_dir": str(folder / "view"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_CACHE_HOME", str(folder / "cache"))
        execute(CacheTeacher(**options))
    return options


@pytest.fixture
def scene(tmp_path: Path, finished: dict[str, Any]) -> Any:
    teacher = Path(shutil.copytree(finished["teacher"], tmp_path / "teacher"))
    scene = Scene(tmp_path, teacher, finished | {"teacher": str(teacher)})
    with scene.cleanup:
        yield scene


# --- what must be refused ----------------------------------------------------------------------------------------


def one_ulp(scene: Scene) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.encoder.layer.0.output.dense.weight"].view(torch.int32)[3, 5] += 1

    scene.weights(nudge)


def weight_dtype(scene: Scene) -> None:
    scene.weights(lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    scene.config(dtype="float16")


def other(name: str) -> Callable[[Scene], None]:
    return lambda scene: scene.weights(lambda tensors: tensors[name].mul_(1.5))


def fewer_layers(scene: Scene) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layer.1." in name]:
            del tensors[name]

    scene.weights(drop)
    scene.config(num_hidden_layers=1)


def configured(**changes: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.config(**changes)


def asked(**options: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.options.update(options)


def labels(*names: str) -> Callable[[Scene], None]:
    return configured(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Scene], None]:
    return lambda scene: scene.json("tokenizer.json", change)


def tokenizer_config(**changes: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.json("tokenizer_config.json", lambda config: config.update(changes))


def another_word(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["tiger"] = vocabulary.pop("cat")


def two_swapped(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]


def added_token(content: dict[str, Any]) -> None:
    word = {"id": 10, "content": "friend", "single_word": False, "lstrip": False, "rstrip": False}
    identity = next(i for word, i in content["model"]["vocab"].items() if word == "friend")
    content["added_tokens"].append(word | {"id": identity, "normalized": True, "special": False})


def separator_first(content: dict[str, Any]) -> None:
    content["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [3]


def pair_without_second_segment(content: dict[str, Any]) -> None:
    for piece in content["post_processor"]["pair"]:
        next(iter(piece.values()))["type_id"] = 0


def no_last_separator(content: dict[str, Any]) -> None:
    content["post_processor"]["single"].pop()


def own_code(scene: Scene) -> None:
    scene.config(auto_map={"AutoModelForSequenceClassification": "own.Own"})
    (scene.teacher / "own.py").write_text(
        "from transformers import BertForSequenceClassification as Bert\n\n\nclass Own(Bert):\n    pass\n"
    )
    scene.options["trust_remote_code"] = True
    scene.patch(sys.modules["transformers.dynamic_module_utils"], "HF_MODULES_CACHE", str(scene.folder / "modules"))


def eager_attention(scene: Scene) -> None:
    scene.patch(Teacher, "attention", "eager")


REFUSED: dict[str, tuple[Callable[[Scene], None], str]] = {
    "one weight by one ulp": (one_ulp, 'teacher.tensors: "'),
    "weight dtype": (weight_dtype, 'teacher.tensors: "'),
    "other head weights": (other("classifier.weight"), 'teacher.tensors: "'),
    "other pooler": (other("bert.pooler.dense.weight"), 'teacher.tensors: "'),
    "other layer norm": (other("bert.encoder.layer.1.output.LayerNorm.weight"), 'teacher.tensors: "'),
    "layer norm eps": (configured(layer_norm_eps=1e-5), "teacher.config.layer_norm_eps: 1e-12 → 1e-05"),
    "activation": (configured(hidden_act="relu"), 'teacher.config.hidden_act: "gelu" → "relu"'),
    "number of heads": (configured(num_attention_heads=8), "teacher.config.num_attention_heads: 4 → 8"),
    "number of layers": (fewer_layers, "teacher.config.num_hidden_layers: 2 → 1"),
    "position embedding type": (
        configured(position_embedding_type="relative_key"),
        'teacher.config.position_embedding_type: (absent) → "relative_key"',
    ),
    "padding token": (configured(pad_token_id=4), "teacher.config.pad_token_id: 0 → 4"),
    "a field nobody knows": (configured(scale_by=2), "teacher.config.scale_by: (absent) → 2"),
    "removed head": (
        configured(architectures=["BertModel"]),
        'teacher.head: "sequence-classification" → "none"',
    ),
    "code of its own": (own_code, 'teacher.code: (absent) → "'),
    "a vocabulary entry": (tokenizer(another_word), 'tokenizer.vocabulary: "'),
    "two swapped vocabulary entries": (tokenizer(two_swapped), 'tokenizer.vocabulary: "'),
    "lower-casing": (
        tokenizer(lambda content: content["normalizer"].update(lowercase=False)),
        "tokenizer.machinery.normalizer.lowercase: true → false",
    ),
    "accents": (
        tokenizer(lambda content: content["normalizer"].update(strip_accents=True)),
        "tokenizer.machinery.normalizer.strip_accents: null → true",
    ),
    "word splitting": (
        tokenizer(lambda content: content.update(pre_tokenizer={"type": "Whitespace"})),
        'tokenizer.machinery.pre_tokenizer.type: "BertPreTokenizer" → "Whitespace"',
    ),
    "how pieces go on": (
        tokenizer(lambda content: content["model"].update(continuing_subword_prefix="@@")),
        'tokenizer.machinery.model.continuing_subword_prefix: "##" → "@@"',
    ),
    "an added token": (tokenizer(added_token), 'tokenizer.machinery.added_tokens: "'),
    "ids of special tokens": (
        tokenizer(separator_first),
        "tokenizer.machinery.post_processor.special_tokens.[CLS].ids: [2] → [3]",
    ),
    "pair template": (
        tokenizer(pair_without_second_segment),
        'tokenizer.machinery.post_processor.pair: "[CLS]:0 A:0 [SEP]:0 B:1 [SEP]:1" → '
        '"[CLS]:0 A:0 [SEP]:0 B:0 [SEP]:0"',
    ),
    "missing last separator": (
        tokenizer(no_last_separator),
        'tokenizer.machinery.post_processor.single: "[CLS]:0 A:0 [SEP]:0" → "[CLS]:0 A:0"',
    ),
    "truncation side": (
        tokenizer_config(truncation_side="left"),
        'tokenizer.truncation_side: "right" → "left"',
    ),
    "segment ids": (
        tokenizer_config(model_input_names=["input_ids", "attention_mask"]),
        "tokenizer.segments: true → false",
    ),
    "padding token of the tokenizer": (
        tokenizer_config(pad_token="[MASK]"),
        'tokenizer.special_tokens.pad_token: "[PAD]" → "[MASK]"',
    ),
    "label order": (
        labels("positive", "neutral", "negative"),
        'capture.label_names: ["negative", "neutral", "positive"] → ["positive", "neutral", "negative"]',
    ),
    "a label renamed": (
        labels("negative", "none", "positive"),
        'capture.label_names: ["negative", "neutral", "positive"] → ["negative", "none", "positive"]',
    ),
    "problem type": (
        configured(problem_type="multi_label_classification"),
        'capture.problem_type: "single_label_classification" → "multi_label_classification"',
    ),
    "max length": (asked(max_length=11), "capture.max_length: 12 → 11"),
    "compute dtype": (asked(dtype="bfloat16"), 'capture.dtype: "float32" → "bfloat16"'),
    "attention implementation": (eager_attention, 'capture.attention: "sdpa" → "eager"'),
}
"""Name → what is changed, and the line that names the field."""


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, scene: Scene, files: Files) -> None:
    """Each against the store alone (a new view), and against store and finished view: the same field either way."""
    change, line = REFUSED[name]
    change(scene)
    done = Path(scene.options["output_dir"])
    before = files(scene.store), files(done)
    for output in (str(scene.folder / "new view"), str(done)):
        scene.options["output_dir"] = output
        with pytest.raises(RefusedError, match="was not captured from this teacher with these settings") as caught:
            scene.run()
        named = [detail for detail in caught.value.details if detail.startswith(line)]
        assert len(named) == 1, caught.value.details
        both = named[0].partition(": ")[2].split(" → ")
        assert len(both) == 2 and both[0] != both[1]
        assert caught.value.exit_code == 3 and "--store" in str(caught.value.fix)
    assert (files(scene.store), files(done)) == before
    assert not (scene.folder / "new view").exists()


def forged(store: Path) -> None:
    """store.json as somebody would edit it who also mends its digest."""
    content = json.loads((store / "store.json").read_text())
    content.pop("digest")
    content["identity"]["capture"]["max_length"] = 64
    (store / "store.json").write_text(json.dumps(content | {"digest": fingerprint(content)}))


def store_edited(scene: Scene) -> None:
    file = scene.store / "store.json"
    file.write_text(file.read_text().replace('"max_length": 12', '"max_length": 13'))


def store_forged(scene: Scene) -> None:
    forged(scene.store)
    scene.options |= {"max_length": 64, "output_dir": str(scene.folder / "new view")}


def corpus_changed(scene: Scene) -> None:
    scene.options["dataset"] = corpus(scene.folder, [*TEXTS[:2], "my old friend sleeps"])


def store_swapped(scene: Scene) -> None:
    """Another teacher's store where the view's was."""
    shutil.rmtree(scene.store)
    create_or_open(scene.store, StoreIdentity(teacher={"tensors": "0"}, tokenizer={}, capture={"max_length": 12}))


def layout(scene: Scene) -> None:
    """As another program would open the store; the command itself keeps the store's layout, and says so."""
    wanted = replace(open_store(scene.store).layout, rows_per_shard=10)
    scene.patch(
        CacheTeacher, "inputs", lambda self: create_or_open(self.store, open_store(self.store).identity, wanted)
    )


OTHERWISE_REFUSED: dict[str, tuple[Callable[[Scene], None], type[KdError], str]] = {
    "hidden dtype of a stored signal": (asked(hidden_dtype="float32"), RefusedError, "float16.*asks for float32"),
    "layers of a finished view": (
        asked(signals="hidden.cls@2"),
        RefusedError,
        'inputs.signals: "hidden.cls@1:float16" → "hidden.cls@2:float16"',
    ),
    "signals of a finished view": (
        asked(signals="hidden.mean@1"),
        RefusedError,
        'inputs.signals: "hidden.cls@1:float16" → "hidden.mean@1:float16"',
    ),
    "corpus changed under a finished view": (corpus_changed, RefusedError, 'inputs.dataset: ".{32}" → ".{32}"'),
    "layout of an existing store": (layout, RefusedError, "rows_per_shard: 4096 → 10"),
    "edited store.json": (store_edited, VerificationError, "has the digest [0-9a-f]{32}, it names [0-9a-f]{32}"),
    "forged store.json": (
        store_forged,
        VerificationError,
        "belongs to another store .[0-9a-f]{32}, this one is [0-9a-f]{32}",
    ),
    "another store in its place": (store_swapped, RefusedError, 'capture.max_length: 12 → 12|teacher.tensors: "0" → '),
}
"""Name → what is changed, the error, and words of it: both values."""


@pytest.mark.parametrize("name", OTHERWISE_REFUSED)
def test_refused_otherwise(name: str, scene: Scene, finished: dict[str, Any], files: Files) -> None:
    change, error, words = OTHERWISE_REFUSED[name]
    for part in ("store", "output_dir"):
        scene.options[part] = shutil.copytree(finished[part], scene.folder / Path(finished[part]).name)
    change(scene)
    before = files(scene.folder / "store"), files(scene.folder / "view")
    with pytest.raises(error) as caught:
        scene.run()
    assert re.search(words, str(caught.value)), caught.value
    assert caught.value.exit_code == {RefusedError: 3, VerificationError: 4}[error]
    assert caught.value.fix
    assert (files(scene.folder / "store"), files(scene.folder / "view")) == before


def test_a_view_of_another_store_is_refused_with_both_identities(scene: Scene, finished: dict[str, Any]) -> None:
    for part in ("store", "output_dir"):
        scene.options[part] = shutil.copytree(finished[part], scene.folder / Path(finished[part]).name)
    own = open_store(scene.store).identity.digest
    store_swapped(scene)
    with pytest.raises(RefusedError, match="made for another store") as caught:
        open_view(scene.folder / "view")
    assert caught.value.details == [
        f"store the view was made for: {own}",
        f"store found: {open_store(scene.store).identity.digest}",
    ]


# --- what must not matter ----------------------------------------------------------------------------------------


def touched(scene: Scene) -> None:
    for file in scene.teacher.iterdir():
        os.utime(file, (1, 1))


def pickled(scene: Scene) -> None:
    torch.save(load_file(scene.teacher / "model.safetensors"), scene.teacher / "pytorch_model.bin")
    (scene.teacher / "model.safetensors").unlink()


def split(scene: Scene, names: str = "model-{:05d}-of-00003.safetensors") -> None:
    tensors = load_file(scene.teacher / "model.safetensors")
    (scene.teacher / "model.safetensors").unlink()
    place = {name: names.format(i % 3 + 1) for i, name in enumerate(sorted(tensors, reverse=True))}
    for file in set(place.values()):
        part = {name: tensors[name] for name in tensors if place[name] == file}
        save_file(part, scene.teacher / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (scene.teacher / "model.safetensors.index.json").write_text(json.dumps(index))


def saved_again(scene: Scene) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scene.teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scene.teacher / name).unlink()
    tokenizer(["a dog"] * 2, padding="max_length", max_length=5, truncation=True)
    tokenizer.save_pretrained(scene.teacher)


def reordered(scene: Scene) -> None:
    scene.options["dataset"] = corpus(scene.folder, TEXTS[::-1])


def with_cache(state: str) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        home = scene.folder / "another cache"
        os.environ["KD_CACHE_HOME"] = str(home)  # the fixture `own_cache` puts it back
        if state == "warm":
            assert describe_teacher(str(scene.teacher)).tensor_digest
            scene.patch(teacher_module, "_load", lambda *args: pytest.fail("the weights were loaded"))
        elif state == "not writable":
            home.write_text("a file")

    return change


def beside_it(name: str, text: str) -> Callable[[Scene], None]:
    return lambda scene: (scene.teacher / name).write_text(text)  # type: ignore[return-value]


HARMLESS: dict[str, Callable[[Scene], None]] = {
    "path": lambda scene: None,
    "a link to it": lambda scene: scene.options.update(teacher=str(linked(scene))),
    "mtime": touched,
    "pytorch_model.bin": pickled,
    "sharded weights": split,
    "names of the files": lambda scene: split(scene, "piece_{}.safetensors"),
    "tokenizer saved again": saved_again,
    "transformers_version": configured(transformers_version="4.31.0"),
    "use_cache": configured(use_cache=False),
    "dropout": configured(hidden_dropout_prob=0.5),
    "a default spelled out": configured(position_embedding_type="absolute"),
    "generation_config": beside_it("generation_config.json", '{"max_length": 3}'),
    "code that nobody uses": beside_it("own.py", "raise SystemExit"),
    "trust without code": asked(trust_remote_code=True),
    "batch size": asked(batch_tokens=64),
    "workers": asked(workers=2),
    "device": asked(device="cpu"),
    "shard size": asked(rows_per_shard=10),
    "hidden dtype spelled out": asked(hidden_dtype="float16"),
    "task spelled out": asked(task="single-label"),
    "order of the corpus": reordered,
    "cache empty": with_cache("empty"),
    "cache warm": with_cache("warm"),
    "cache not writable": with_cache("not writable"),
}


def linked(scene: Scene) -> Path:
    link = scene.folder / "link"
    link.symlink_to(scene.teacher)
    return link


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(name: str, scene: Scene, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    HARMLESS[name](scene)
    before = files(scene.store)
    assert scene.run().skipped
    assert files(scene.store) == before


def test_a_length_above_the_teachers_is_the_teachers(scene: Scene) -> None:
    teacher = describe_teacher(str(scene.teacher))
    identities = [store_identity(teacher, max_length=length, dtype="float32") for length in (64, 65, 512)]
    assert identities[0] == identities[1] == identities[2]
    options = scene.options | {"store": str(scene.folder / "none yet")}
    views = [CacheTeacher(**options | {"max_length": length}) for length in (64, 512)]
    assert views[0].fingerprint_of(views[0].inputs()) == views[1].fingerprint_of(views[1].inputs())


def test_a_view_without_a_hidden_dtype_is_one_of_the_dtype_that_the_store_has(scene: Scene) -> None:
    """Left out, the option means what the store holds; the view must not pass for one of other numbers."""
    options = scene.options | {"store": str(scene.folder / "exact"), "output_dir": str(scene.folder / "first")}
    execute(CacheTeacher(**options, hidden_dtype="float32"))
    left_out = execute(CacheTeacher(**options | {"output_dir": str(scene.folder / "second")}))
    assert left_out.artifact is not None
    assert left_out.artifact.manifest["inputs"]["signals"] == "hidden.cls@1:float32"
    assert execute(CacheTeacher(**options)).skipped


@pytest.mark.slow
def test_another_hash_seed_in_another_process_in_another_folder_is_harmless(scene: Scene) -> None:
    program = (
        "import sys; from kd.stages.cache_teacher.teacher import describe_teacher, store_identity; "
        "print(store_identity(describe_teacher(sys.argv[1]), max_length=12, dtype='float32').digest)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(
        [sys.executable, "-c", program, str(scene.teacher)],
        env=environment, cwd=scene.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == open_store(scene.store).identity.digest


# --- tokenizers of other kinds -----------------------------------------------------------------------------------


def pair_merging(merges: list[tuple[str, str]]) -> Any:
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", *"abcdefgh", "ab", "cd", "abcd", "bc"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def test_merges_and_their_order_are_behaviour() -> None:
    tables = [
        [("a", "b"), ("c", "d"), ("ab", "cd")],
        [("c", "d"), ("a", "b"), ("ab", "cd")],
        [("a", "b"), ("c", "d")],
        [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")],
    ]
    identities = [tokenizer_identity(pair_merging(merges)) for merges in tables]
    assert len({fingerprint(identity["machinery"]["model"]) for identity in identities}) == 4
    assert tokenizer_identity(pair_merging(tables[0])) == identities[0]


def test_scores_of_a_unigram_model_are_behaviour() -> None:
    def unigram(score: float) -> Any:
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", score)], unk_id=0))
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    assert tokenizer_identity(unigram(-1.5)) != tokenizer_identity(unigram(-3.0))


def test_tokenizers_written_in_python_are_told_apart_by_what_they_do(letters: type[Any]) -> None:
    class OneBetween(letters):
        between = 2

    class Capitals(letters):
        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return list(text.upper())

    plain = tokenizer_identity(letters())
    assert tokenizer_identity(letters()) == plain
    for other_kind in (OneBetween, Capitals):
        assert tokenizer_identity(other_kind())["probes"] != plain["probes"]
