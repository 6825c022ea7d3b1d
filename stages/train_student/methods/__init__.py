"""Distillation methods, one file each. Adding one: its file, its line here, its test."""

from . import hard, hidden_mse, logit_mse, pkd, soft_target
from .base import Method, Shapes, StudentOutputs, Targets, Term, layer_pairs, methods, parse_methods

__all__ = [
    "Method",
    "Shapes",
    "StudentOutputs",
    "Targets",
    "Term",
    "hard",
    "hidden_mse",
    "layer_pairs",
    "logit_mse",
    "methods",
    "parse_methods",
    "pkd",
    "soft_target",
]
