"""Where kd keeps what it can make again: digests of teachers, copies of remote files."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """`$KD_CACHE_HOME`, else `kd` in the user's cache folder."""
    if home := os.environ.get("KD_CACHE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd"
