"""Which teacher it is, and which may not be used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.pipeline.errors import RefusedError, UsageError
from kd.stages.cache_teacher import teacher as teacher_module
from kd.stages.cache_teacher.identity import behaviour_config, tensor_digest, tokenizer_identity
from kd.stages.cache_teacher.teacher import describe_teacher, resolve_device


@pytest.fixture
def folder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher to spoil."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def digest(folder: Path) -> str:
    return describe_teacher(str(folder)).tensor_digest


# --- the digest of the tensors -----------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_place_file_format_or_sharding(folder: Path, tmp_path: Path) -> None:
    expected = digest(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert digest(moved) == expected

    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert digest(pickled) == expected

    sharded = tmp_path / "sharded"
    described = describe_teacher(str(folder))
    model: Any = described.load("auto")
    model.save_pretrained(sharded, max_shard_size="20KB")
    described.tokenizer.save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert digest(sharded) == expected


def test_the_digest_sees_one_bit_of_one_weight(folder: Path) -> None:
    before = digest(folder)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.encoder.layer.0.output.dense.weight"].view(torch.int32)[3, 5] ^= 1

    edit_weights(folder, flip)
    assert digest(folder) != before


def test_the_digest_sees_names_shapes_and_dtypes() -> None:
    def model(name: str, tensor: torch.Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return module

    zeros = torch.zeros(4)
    digests = {
        tensor_digest(model("a", zeros)),
        tensor_digest(model("b", zeros)),
        tensor_digest(model("a", zeros.reshape(2, 2))),
        tensor_digest(model("a", zeros.half())),
        tensor_digest(model("a", torch.zeros(4, dtype=torch.int32))),
    }
    assert len(digests) == 5


def test_tied_tensors_count_once() -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Linear(3, 3, bias=False)
    alone = tensor_digest(module)
    module.second = torch.nn.Module()
    module.second.weight = module.first.weight
    assert tensor_digest(module) == alone


def test_known_files_are_not_loaded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(folder)
    monkeypatch.setattr(teacher_module, "_load", lambda *args: pytest.fail("the weights were loaded"))
    assert digest(folder) == before


def test_weights_changed_in_place_under_the_same_size_and_time_are_seen(folder: Path) -> None:
    before = digest(folder)
    file = folder / "model.safetensors"
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"\x11")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert digest(folder) != before


@pytest.mark.parametrize("content", [b"", b"{", b'{"sha256": 7}', b'{"sha256": "short"}', b"[]", b"\xff"])
def test_a_damaged_cache_is_one_that_is_not_there(folder: Path, own_cache: Path, content: bytes) -> None:
    before = digest(folder)
    (entry,) = (own_cache / "teacher-digests").iterdir()
    entry.write_bytes(content)
    assert digest(folder) == before


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert len(digest(folder)) == 64


def test_a_half_precision_checkpoint_is_another_teacher_and_loads_in_any_dtype(folder: Path) -> None:
    whole = digest(folder)
    edit_weights(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    edit_config(folder, dtype="float16")
    teacher = describe_teacher(str(folder))
    assert teacher.tensor_digest != whole
    dtypes = {name: next(teacher.load(name).parameters()).dtype for name in ("auto", "float32", "bfloat16")}
    assert dtypes == {"auto": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


# --- teachers that may not be used -------------------------------------------------------------------------------


def test_missing_head_weights_are_refused_by_name(folder: Path) -> None:
    edit_weights(folder, lambda tensors: [tensors.pop(f"classifier.{name}") for name in ("weight", "bias")])
    with pytest.raises(RefusedError, match="lacks 2 tensors of BertForSequenceClassification") as caught:
        describe_teacher(str(folder)).load()
    assert caught.value.details == ["classifier.bias", "classifier.weight"]
    assert "kd train-teacher" in str(caught.value.fix)


def test_tensors_of_another_shape_are_refused_with_both_shapes(folder: Path) -> None:
    edit_config(folder, id2label={str(i): f"c{i}" for i in range(5)}, label2id={f"c{i}": i for i in range(5)})
    with pytest.raises(RefusedError, match=r"another shape than config\.json says") as caught:
        describe_teacher(str(folder)).load()
    assert "classifier.weight: (3, 32) in the checkpoint, (5, 32) by config.json" in caught.value.details


def test_layers_that_the_config_leaves_out_are_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(RefusedError, match="have no place in the BertForSequenceClassification"):
        describe_teacher(str(folder)).load()


def test_adapter_tensors_are_refused(folder: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.lora_A.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(2, 32)}))
    with pytest.raises(RefusedError, match="merge the adapter"):
        describe_teacher(str(folder)).load()


def test_a_pretraining_head_and_computed_buffers_beside_the_model_do_no_harm(folder: Path) -> None:
    before = digest(folder)
    extra = {
        "cls.predictions.bias": torch.zeros(7),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    edit_weights(folder, lambda tensors: tensors.update(extra))
    assert digest(folder) == before


def test_truncated_weights_are_refused_in_one_sentence(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RefusedError, match="cannot be read"):
        describe_teacher(str(folder)).load()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save({**tensors, "classifier.bias": Payload(tmp_path / "it ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match="cannot be read"):
        describe_teacher(str(folder)).load()
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["config.json"], "has no config.json"),
        (["model.safetensors"], "holds no weights"),
        (["tokenizer.json", "tokenizer_config.json"], "holds no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_without_loading(folder: Path, remove: list[str], message: str) -> None:
    for name in remove:
        (folder / name).unlink()
    with pytest.raises(RefusedError, match=message):
        describe_teacher(str(folder))


def test_an_adapter_folder_is_refused_with_the_way_to_merge_it(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedError, match="holds an adapter") as caught:
        describe_teacher(str(folder))
    assert "merge_and_unload" in str(caught.value.fix)
    (folder / "config.json").unlink()
    with pytest.raises(RefusedError, match=r"has no config\.json") as caught:
        describe_teacher(str(folder))
    assert "merge_and_unload" in str(caught.value.fix)


def test_code_from_the_checkpoint_needs_trust(folder: Path) -> None:
    edit_config(folder, model_type="homemade", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(RefusedError, match="needs Python code") as caught:
        describe_teacher(str(folder))
    assert "--trust-remote-code" in str(caught.value.fix)


def test_a_known_class_with_code_beside_it_runs_the_known_class(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    assert type(describe_teacher(str(folder)).load()).__module__.startswith("transformers.")


OWN_CLASS = (
    "from transformers import BertForSequenceClassification\n\nclass Own(BertForSequenceClassification):\n    pass\n"
)


def with_code(folder: Path, reference: str = "own.Own") -> Path:
    """The teacher, with a class of its own in own.py."""
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": reference})
    (folder / "own.py").write_text(OWN_CLASS)
    return folder


def code_of(folder: Path, **options: Any) -> str | None:
    return describe_teacher(str(folder), **options).identity(tensors="known").get("code")


def test_trusted_code_is_part_of_the_identity_with_all_its_files(folder: Path) -> None:
    with_code(folder)
    assert code_of(folder) is None
    digests = [code_of(folder, trust_remote_code=True)]
    (folder / "parts" / "deep").mkdir(parents=True)
    for file, content in (("own.py", OWN_CLASS + "#"), ("parts/deep/more.py", ""), ("parts/deep/more.py", "a = 1")):
        (folder / file).write_text(content)
        digests.append(code_of(folder, trust_remote_code=True))
    (folder / "notes.txt").write_text("no code")
    (folder / "parts" / "round").symlink_to(folder)
    assert None not in digests and len(set(digests)) == 4
    assert code_of(folder, trust_remote_code=True) == digests[-1]


def test_trust_without_code_makes_no_other_teacher(folder: Path) -> None:
    (folder / "unrelated.py").write_text("a = 1")
    plain = describe_teacher(str(folder)).identity()
    assert describe_teacher(str(folder), trust_remote_code=True).identity() == plain


@pytest.mark.parametrize(
    "reference", ["somebody/else--own.Own", "/tmp/own.Own", "missing.Own", "sub/missing.Own", "a b.C"]
)
def test_code_from_outside_the_folder_is_refused(folder: Path, reference: str) -> None:
    with_code(folder, reference)
    with pytest.raises(RefusedError, match="takes Python code from outside its folder") as caught:
        describe_teacher(str(folder), trust_remote_code=True)
    assert reference in str(caught.value)
    edit_config(folder, auto_map=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, reference]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="takes Python code from outside its folder"):
        describe_teacher(str(folder), trust_remote_code=True)


def test_a_config_that_changes_between_description_and_loading_is_refused(folder: Path) -> None:
    teacher = describe_teacher(str(folder))
    edit_config(folder, hidden_act="relu")
    with pytest.raises(RefusedError, match="changed while it was in use") as caught:
        teacher.load()
    assert caught.value.details == ['hidden_act: "gelu" → "relu"']


def test_an_encoder_decoder_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bart", "d_model": 32, "vocab_size": 133}))
    with pytest.raises(RefusedError, match="is an encoder-decoder"):
        describe_teacher(str(folder))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder: Path) -> None:
    edit_config(folder, vocab_size=100)
    with pytest.raises(RefusedError, match="the tokenizer has 133 tokens, the model 100 embeddings"):
        describe_teacher(str(folder))


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/teacher", "~/nothing-here", "a/b/c"])
def test_a_path_that_is_not_there_is_said_to_be_missing(source: str) -> None:
    with pytest.raises(RefusedError, match="does not exist"):
        describe_teacher(source)


def test_a_hub_id_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(RefusedError, match="is no folder here, and the hub does not give it"):
        describe_teacher("nobody/nothing-of-the-kind")


def test_a_file_is_refused_with_its_folder(folder: Path) -> None:
    with pytest.raises(RefusedError, match="a teacher is a folder") as caught:
        describe_teacher(str(folder / "config.json"))
    assert str(folder) in str(caught.value.fix)


def test_an_unknown_problem_type_names_the_nearest(folder: Path) -> None:
    edit_config(folder, problem_type="multi_label")
    with pytest.raises((RefusedError, ValueError), match="problem_type"):
        describe_teacher(str(folder))


# --- what it says of itself --------------------------------------------------------------------------------------


def test_labels_come_in_the_order_of_the_logits(folder: Path) -> None:
    edit_config(folder, id2label={"2": "c", "0": "a", "1": "b"}, label2id={"a": 0, "b": 1, "c": 2})
    teacher = describe_teacher(str(folder))
    assert teacher.label_names == ("a", "b", "c")
    assert (teacher.task, teacher.num_layers, teacher.hidden_size, teacher.num_labels) == ("single-label", 2, 32, 3)


def test_a_single_output_without_a_problem_type_is_a_regression(tmp_path: Path, folder: Path) -> None:
    edit_config(folder, id2label={"0": "score"}, label2id={"score": 0}, problem_type=None)
    assert describe_teacher(str(folder)).task == "regression"


def test_a_bare_encoder_has_no_labels_and_loses_a_random_pooler(folder: Path) -> None:
    edit_config(folder, architectures=["BertModel"])
    edit_weights(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".pooler." in name or "classif" in name]
    )
    teacher = describe_teacher(str(folder))
    assert (teacher.has_head, teacher.label_names, teacher.task) == (False, (), None)
    model: Any = teacher.load()
    assert model.pooler is None


def test_positions_that_start_after_the_padding_index_shorten_the_longest_input(folder: Path) -> None:
    edit_config(folder, model_type="roberta", pad_token_id=1, max_position_embeddings=40)
    assert describe_teacher(str(folder)).max_tokens == 38


def test_the_config_identity_ignores_what_an_evaluated_model_ignores(folder: Path) -> None:
    before = behaviour_config(describe_teacher(str(folder)).config)
    edit_config(
        folder,
        hidden_dropout_prob=0.5,
        initializer_range=0.9,
        use_cache=False,
        id2label={"0": "x", "1": "y", "2": "z"},
        label2id={"x": 0, "y": 1, "z": 2},
        transformers_version="4.0.0",
        position_embedding_type="absolute",
        layer_norm_eps=1e-12,
    )
    assert behaviour_config(describe_teacher(str(folder)).config) == before


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}, {"num_attention_heads": 8}])
def test_the_config_identity_sees_what_changes_the_computation(folder: Path, change: dict[str, Any]) -> None:
    before = behaviour_config(describe_teacher(str(folder)).config)
    edit_config(folder, **change)
    assert behaviour_config(describe_teacher(str(folder)).config) != before


def test_the_tokenizer_identity_is_its_behaviour(folder: Path, tmp_path: Path) -> None:
    tokenizer = describe_teacher(str(folder)).tokenizer
    before = tokenizer_identity(tokenizer)
    tokenizer(["a text", "another"], truncation=True, max_length=5, padding="max_length")
    assert tokenizer_identity(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tmp_path / "saved" / file)
    assert tokenizer_identity(describe_teacher(str(tmp_path / "saved")).tokenizer) == before

    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(raw))
    assert tokenizer_identity(describe_teacher(str(folder)).tokenizer) != before


# --- devices -----------------------------------------------------------------------------------------------------


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'cdua' \(did you mean 'cuda'\?\)"):
        resolve_device("cdua")


def test_a_device_that_is_not_here_is_refused() -> None:
    for name in ("cuda", "cuda:3", "mps"):
        if name == "mps" and torch.backends.mps.is_available():
            continue
        with pytest.raises(RefusedError, match="is not available here"):
            resolve_device(name)
    assert resolve_device("cpu") == resolve_device(None) == "cpu"
