"""Errors say what, the value, where and the fix; and survive the trip between processes."""

from __future__ import annotations

import pickle

import pytest

from kd.pipeline.errors import IncompleteError, KdError, RefusedError, UsageError, VerificationError, near_match


def test_an_error_prints_what_details_and_fix_on_their_own_lines() -> None:
    error = RefusedError("the store has 3 labels", details={"found": "a, b, c"}, fix="kd cache-teacher --store NEW")
    assert str(error).splitlines() == [
        "the store has 3 labels",
        "  found: a, b, c",
        "  fix: kd cache-teacher --store NEW",
    ]


@pytest.mark.parametrize(
    ("cls", "code"), [(KdError, 1), (UsageError, 2), (RefusedError, 3), (VerificationError, 4), (IncompleteError, 5)]
)
def test_every_error_keeps_its_class_and_text_through_pickle(cls: type[KdError], code: int) -> None:
    error = cls("what", details=["detail"], fix="fix")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.exit_code == code


def test_an_unknown_name_gets_its_near_match_or_the_whole_list() -> None:
    assert "hidden.cls" in near_match("hiden.cls", ["logits", "hidden.cls"])
    assert near_match("zzz", ["logits", "hidden.cls"]) == " (known: hidden.cls, logits)"
