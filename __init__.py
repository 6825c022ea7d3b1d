"""kd: an offline teacher-logit caching pipeline for knowledge distillation.

Names are imported when they are first used: `import kd` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pipeline.stage import Outcome
    from .pipeline.store import open_store as open_store
    from .stages.train_student.loading import load_student as load_student

    __version__: str
    train_teacher: Callable[..., Outcome]
    augment: Callable[..., Outcome]
    cache_teacher: Callable[..., Outcome]
    train_student: Callable[..., Outcome]
    evaluate: Callable[..., Outcome]
    compare: Callable[..., Outcome]

_FUNCTIONS = ("train_teacher", "augment", "cache_teacher", "train_student", "evaluate", "compare")

__all__ = [
    "__version__",
    "augment",
    "cache_teacher",
    "compare",
    "evaluate",
    "load_student",
    "open_store",
    "train_student",
    "train_teacher",
]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("kd-pipeline")
    elif name == "open_store":
        from .pipeline.store import open_store as value
    elif name == "load_student":
        from .stages.train_student.loading import load_student as value
    elif name in _FUNCTIONS:
        from .stages import stage_function

        value = stage_function(name.replace("_", "-"))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
