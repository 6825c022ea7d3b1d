"""Optimisers by name: those of transformers, and Adadelta, which it does not name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .training_options import ADADELTA

RHO = 0.95
"""Adadelta's decay rate, as in Zeiler, ADADELTA (arXiv 1212.5701), and whoever trains BiLSTMs with it."""


class OptimizerTrainer(Trainer):
    """A `Trainer` whose `optim` may also be `adadelta`."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """The class of the optimiser, and what it is made with beside the parameters."""
        if args.optim == ADADELTA:
            return torch.optim.Adadelta, {"lr": args.learning_rate, "rho": RHO}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
