"""`kd cache-teacher`: run a teacher over a corpus once and keep what it says."""

from .stage import CacheTeacher

__all__ = ["CacheTeacher"]
