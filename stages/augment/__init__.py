"""`kd augment`: views of a corpus, made before the teacher sees it."""

from .augment import Augment

__all__ = ["Augment"]
