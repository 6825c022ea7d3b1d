"""Fingerprints depend on values alone: not on key order, hash seed or process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.fingerprint import canonical_json, differing_fields, fingerprint

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_key_order_does_not_matter(mapping: dict[str, object]) -> None:
    assert fingerprint(mapping) == fingerprint(dict(reversed(mapping.items())))


@given(st.dictionaries(st.text(), values, max_size=4), st.dictionaries(st.text(), values, max_size=4))
def test_fields_differ_exactly_when_the_canonical_forms_differ(old: dict[str, object], new: dict[str, object]) -> None:
    assert bool(differing_fields(old, new)) == (canonical_json(old) != canonical_json(new))


def test_the_hash_seed_of_the_process_does_not_matter() -> None:
    code = "from kd.pipeline.fingerprint import fingerprint; print(fingerprint({'b': 1, 'a': ['x', {'z': 1.5}]}))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_values_without_a_canonical_form_are_refused() -> None:
    with pytest.raises(ValueError):
        fingerprint({"x": float("nan")})
