"""Students, one file each. Adding one: its file, its line here, its test."""

from . import bert, bilstm, mobilebert
from .base import GENERAL, Build, Start, Student, Task, TeacherFacts, parse_start, parse_student, students

__all__ = [
    "GENERAL",
    "Build",
    "Start",
    "Student",
    "Task",
    "TeacherFacts",
    "bert",
    "bilstm",
    "mobilebert",
    "parse_start",
    "parse_student",
    "students",
]
