"""Shared fixtures: a tiny seeded teacher with a real WordPiece tokenizer, and sentences made of its words."""

from __future__ import annotations

import os

# Before any test imports them: no hub, no forked tokenizer threads, one thread a test process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import itertools
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C
# would then wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SUBJECTS = [
    *("the cat", "a dog", "my old friend", "the tall teacher"),
    *("every small student", "our card", "this bank account", "the film"),
]
VERBS = ["likes", "reads", "sees", "never finds", "often breaks", "slowly opens", "loses", "gladly pays for"]
OBJECTS = [
    *("the book", "a warm dinner", "green apples", "the transfer"),
    *("nothing at all", "two bright stars", "the long plot", "its own fee"),
]
ENDINGS = ["", "today", "in the rain", "without a word", "on the train to town", ", and everyone laughs at it"]


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` distinct English sentences of 4 to 17 words, in an order that follows from the seed."""
    grid = [
        " ".join(filter(None, parts)).replace(" ,", ",")
        for parts in itertools.product(SUBJECTS, VERBS, OBJECTS, ENDINGS)
    ]
    random.Random(seed).shuffle(grid)
    assert count <= len(grid)
    return grid[:count]


def make_tiny_teacher(
    folder: Path,
    *,
    num_labels: int = 3,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 32,
    **config_fields: object,
) -> Path:
    """Save a seeded BertForSequenceClassification and a WordPiece tokenizer over the words of `make_sentences`."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = sorted(
        {word for phrase in (*SUBJECTS, *VERBS, *OBJECTS, *ENDINGS) for word in phrase.replace(",", " , ").split()}
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*words, *letters, *(f"##{letter}" for letter in letters), ".", "!", "?", "'", "-", *"0123456789"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    names = ["negative", "neutral", "positive"] if num_labels == 3 else [f"class_{i}" for i in range(num_labels)]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=64,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="single_label_classification",
        **config_fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config).eval()
        # The default initialisation (0.02) gives logits that hardly depend on the input; this one does.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out `faults` unless `-m` names them; here and not in `addopts`, since the last `-m` alone counts.

    Side by side, files with slow tests come first: none is then left for one process when the other has nothing to do.
    """
    if "faults" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("faults")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in set(left_out)]
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: slow[item.path], reverse=True)


modules_set_aside = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Set imported libraries aside from garbage collection: every end of a training collects, and would look at each of
    their millions of objects.
    """
    global modules_set_aside
    if len(sys.modules) > modules_set_aside + 100:
        gc.collect()
        gc.freeze()
        modules_set_aside = len(sys.modules)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """200 distinct sentences in words that the tiny teacher's tokenizer knows."""
    return make_sentences(200)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded 2-layer BERT classifier (hidden 32, 4 heads, labels negative/neutral/positive)."""
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """A program to start instead of `sys.executable` where imports are not what is tested: see warm.py."""
    source = Path(__file__).with_name("warm.py")
    with tempfile.TemporaryDirectory(prefix="kd-warm-") as folder:  # the path of a socket is short
        place, client = Path(folder, "socket"), Path(folder, "python")
        client.write_text(runpy.run_path(str(source))["CLIENT"].format(python=sys.executable, socket=str(place)))
        client.chmod(0o755)
        command = [sys.executable, str(source), str(place)]
        # kd says so to torch before it imports it, which is too late here.
        environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as server:
            assert server.stdin is not None and server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield str(client)
            server.stdin.close()  # which ends it


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback with a bucket `kd-tests`; the environment leads s3fs to it, here and in children."""
    import logging

    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        filesystem = fsspec.filesystem("s3", use_listings_cache=False)
        filesystem.mkdir("kd-tests")
        yield f"http://{host}:{port}"
        filesystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """A place on the S3 server that no other test uses."""
    return f"s3://kd-tests/{uuid.uuid4().hex}/store"
