"""Distillation methods, one file each. Adding one: its file, its line here, its line in the test table, a recipe."""

# Importing a method enters it.
from . import (  # noqa: F401
    alp_kd,
    ckd,
    codir,
    distilbert,
    fitnets,
    fsp,
    hard,
    ir_kd,
    logit_mse,
    minilm,
    minilmv2,
    mobilebert,
    pkd,
    rail_kd,
    soft_target,
    tinybert,
)
from .base import (
    OF_WORDS,
    Heads,
    Method,
    Shapes,
    StudentOutputs,
    Targets,
    Term,
    Unfit,
    by_teacher_token,
    fitting_form,
    fitting_methods,
    methods,
    parse_methods,
)
from .layer_maps import layer_groups, layer_pairs

__all__ = [
    "OF_WORDS",
    "Heads",
    "Method",
    "Shapes",
    "StudentOutputs",
    "Targets",
    "Term",
    "Unfit",
    "by_teacher_token",
    "fitting_form",
    "fitting_methods",
    "layer_groups",
    "layer_pairs",
    "methods",
    "parse_methods",
]
