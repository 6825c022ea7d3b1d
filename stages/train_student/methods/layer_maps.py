"""Which layers of the two models belong together: pairs and groups, from their written form.

Layer 0 is the embedding output, 1..L the blocks; M is the student's number of blocks, L the teacher's.
"""

from __future__ import annotations

from ....pipeline.errors import UsageError
from .base import Shapes

PAIRS = "skip, last, middle, final or pairs student-teacher like 1-2+2-4"
GROUPS = "all, regular, overlap, cross, skip or groups student-teachers like 1-1.2.3+2-4.5.6"


def layer_pairs(
    text: str, shapes: Shapes, *, where: str, with_last: bool = True, first: int = 0
) -> tuple[tuple[int, int], ...]:
    """Pairs (student layer, teacher layer).

    - `skip` (or `uniform`) spreads the student's blocks evenly, g(m) = m L / M rounded;
    - `last` takes the teacher's top blocks, g(m) = L - M + m (Sun et al., arXiv 1908.09355, section 3.2);
    - `middle` is one pair, the blocks half-way up; `final` is the two last blocks;
    - `1-2+2-4` names pairs student-teacher.

    Args:
        where: the option, for messages.
        with_last: whether `skip` and `last` include the student's last block.
        first: the lowest layer that pairs may name: 1 where embeddings have nothing of the kind.

    Raises:
        UsageError: not of that form, a pair that is named twice, or a layer that a model does not have.
    """
    num_student, num_teacher = shapes.student_layers, shapes.teacher_layers
    top = num_student if with_last else num_student - 1
    if text in ("skip", "uniform"):
        return tuple((m, max(1, int(m * num_teacher / num_student + 0.5))) for m in range(1, top + 1))
    if text == "last":
        if num_student > num_teacher:
            raise UsageError(
                f"{where} is 'last', and the student has more layers ({num_student}) than the teacher ({num_teacher})",
                fix="use skip, or name pairs: 1-2+2-4 (student-teacher)",
            )
        return tuple((m, num_teacher - num_student + m) for m in range(1, top + 1))
    if text == "middle":
        return (((num_student + 1) // 2, (num_teacher + 1) // 2),)
    if text == "final":
        return ((num_student, num_teacher),)
    pairs = []
    for piece in text.split("+"):
        student, _, teacher = piece.partition("-")
        if not (student.isdecimal() and teacher.isdecimal()):
            raise UsageError(f"{where} is {text!r}; expected {PAIRS}")
        pairs.append((int(student), int(teacher)))
    if len({*pairs}) < len(pairs):
        raise UsageError(f"{where} is {text!r}, which names a pair twice", fix="a weight makes it count more")
    _check_layers([student for student, _ in pairs], num_student, "student", where, first)
    _check_layers([teacher for _, teacher in pairs], num_teacher, "teacher", where, first)
    return tuple(pairs)


def layer_groups(text: str, shapes: Shapes, *, where: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Per student block m = 1..M the teacher blocks that it is compared with together.

    - `all`: every block of the teacher;
    - `regular`: consecutive blocks of L / M, the last of them g(m) = m L / M;
    - `overlap`: each widened by one layer on both sides;
    - `cross`: of that, every second layer, down and up from g(m);
    - `skip`: every M-th layer from m on (Wu et al., arXiv 2010.03034, for these four);
    - `1-1.2.3+2-4.5.6` names groups student-teachers, layer 0 included.

    Raises:
        UsageError: not of that form, two groups of one student layer, or a layer that a model does not have.
    """
    num_student, num_teacher = shapes.student_layers, shapes.teacher_layers
    if text == "all":
        return tuple((m, tuple(range(1, num_teacher + 1))) for m in range(1, num_student + 1))
    if text == "skip":
        return tuple(
            (m, tuple(range(min(m, num_teacher), num_teacher + 1, num_student))) for m in range(1, num_student + 1)
        )
    if text in ("regular", "overlap", "cross"):
        groups = []
        for m in range(1, num_student + 1):
            last = max(1, m * num_teacher // num_student)
            low = min((m - 1) * num_teacher // num_student + 1, last)
            if text == "regular":
                groups.append((m, tuple(range(low, last + 1))))
                continue
            wide_low, wide_last = max(1, low - 1), min(num_teacher, last + 1)
            kept = [layer for layer in range(wide_low, wide_last + 1) if text == "overlap" or (layer - last) % 2 == 0]
            groups.append((m, tuple(kept)))
        return tuple(groups)
    found = []
    for piece in text.split("+"):
        student, _, teachers = piece.partition("-")
        layers = teachers.split(".")
        if not (student.isdecimal() and all(layer.isdecimal() for layer in layers)):
            raise UsageError(f"{where} is {text!r}; expected {GROUPS}")
        found.append((int(student), tuple(map(int, layers))))
    if len({student for student, _ in found}) < len(found):
        raise UsageError(f"{where} is {text!r}, which has two groups for a student layer", fix="put them into one")
    _check_layers([student for student, _ in found], num_student, "student", where, 0)
    _check_layers([layer for _, layers in found for layer in layers], num_teacher, "teacher", where, 0)
    return tuple(found)


def _check_layers(layers: list[int], num_layers: int, side: str, where: str, first: int) -> None:
    wrong = [layer for layer in layers if not first <= layer <= num_layers]
    if wrong:
        raise UsageError(f"{where} names layer {wrong[0]} of the {side}, which has layers {first} to {num_layers}")
