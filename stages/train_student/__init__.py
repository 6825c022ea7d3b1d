"""`kd train-student`: a student from a view, methods and stored teacher signals. Importing this is light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import LoadedStudent, load_student
    from .stage import TrainStudent

_HOMES = {"LoadedStudent": "loading", "TrainStudent": "stage", "load_student": "loading"}

__all__ = ["LoadedStudent", "TrainStudent", "load_student"]


def __getattr__(name: str) -> Any:
    # By name: a process that loads a finished student gets no training code with it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
