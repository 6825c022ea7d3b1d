"""What others trained distilled BiLSTMs with: options and `TrainingArguments` under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ...training_options import ADADELTA


@dataclass(frozen=True)
class Preset:
    """A BiLSTM as somebody published it.

    What kd does in its own way stays so: dropout acts on the embeddings and on the head's layer, the head's layer is a
    ReLU, and a pair is compared by [u; v; |u - v|; u * v].

    Attributes:
        options: of the student, by name; what the user writes counts instead.
        training: `TrainingArguments`, for what the user leaves open.
        beside: options of `kd train-student` that belong to it, and what it does with pairs.
        source: where the values are from.
    """

    options: Mapping[str, Any]
    training: Mapping[str, Any]
    beside: str
    source: str


_ADADELTA = {
    "optim": ADADELTA,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "kd": Preset(
            options={},
            training={
                "learning_rate": 2e-3,
                "per_device_train_batch_size": 64,
                "num_train_epochs": 10,
                "weight_decay": 0.0,
                "warmup_steps": 0.05,
            },
            beside="",
            source="kd's own",
        ),
        "tang": Preset(
            options={
                "units": "words",
                "embedding_size": 300,
                "multichannel": True,
                "hidden_size": 150,
                "num_layers": 1,
                "head_size": 200,
                "pooling": "last",
                "dropout": 0.1,
            },
            training={**_ADADELTA, "per_device_train_batch_size": 50, "num_train_epochs": 30},
            beside="--method logit-mse --init vectors:FILE (word2vec of Google News); pairs: hidden_size=300, "
            "--per-device-train-batch-size 256",
            source="Tang et al., arXiv 1903.12136; sizes and epochs of castorini/d-bert confs/birnn_sst2_150.json",
        ),
        "paddle": Preset(
            options={
                "units": "pieces",
                "embedding_size": 300,
                "hidden_size": 300,
                "num_layers": 1,
                "head_size": 300,
                "pooling": "last",
                # Its 0.2 stands between stacked layers, and there is one.
                "dropout": 0.0,
            },
            training={**_ADADELTA, "per_device_train_batch_size": 128, "num_train_epochs": 6},
            beside="--method logit-mse --init vectors:FILE (word2vec of Google News); pairs: "
            "--per-device-train-batch-size 256",
            source="PaddleNLP examples/model_compression/distill_lstm",
        ),
        "inc": Preset(
            options={
                "units": "words",
                "max_words": 10_000,
                "embedding_size": 50,
                "hidden_size": 64,
                "num_layers": 2,
                "head_size": 0,
                "pooling": "last",
                "dropout": 0.2,
            },
            training={
                "optim": "adamw_torch",
                "learning_rate": 1e-4,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0.0,
                "weight_decay": 0.0,
                "max_grad_norm": 0.0,
                "per_device_train_batch_size": 32,
                "num_train_epochs": 20,
            },
            beside="--method soft-target:0.5:temperature=1,hard:0.5 --init vectors:FILE (GloVe, 50 features)",
            source="intel/neural-compressor examples/pytorch/nlp/huggingface_models/text-classification/distillation",
        ),
    }
)
