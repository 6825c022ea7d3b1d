"""Loading a finished student in a process that has no training code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kd
from kd.pipeline.errors import RefusedError

PROGRAM = """
import sys
import kd
student = kd.load_student(sys.argv[1])
model, tokenizer = student
print(student(["the cat likes the book"]).shape, type(model).__name__)
parts = ("methods", "losses", "trainer", "training", "students", "store", "cache_teacher", "corpus")
training = [name for name in sys.modules if name.startswith("kd.") and any(part in name for part in parts)]
heavy = [name for name in ("datasets", "zarr", "dask", "pyarrow", "accelerate") if name in sys.modules]
print("training code:", training, "heavy:", [name for name in heavy if name in ("zarr", "dask")])
"""


def test_no_training_code_is_loaded(view: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kd.train_student(
        view=str(view.path),
        student="bilstm:hidden_size=4",
        output_dir=str(run),
        max_steps=2,
        per_device_train_batch_size=8,
    )
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run)], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.splitlines() == [
        "(1, 3) BiLstmForSequenceClassification",
        "training code: [] heavy: []",
    ]


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no config\.json"):
        kd.load_student(tmp_path)


def test_the_stage_definition_imports_nothing_heavy() -> None:
    program = (
        "import sys, kd.stages.train_student; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'pyarrow', 'zarr') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
