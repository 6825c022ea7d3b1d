"""`kd compare`: teacher, baselines and students on one split, by one protocol."""

from .stage import Compare

__all__ = ["Compare"]
