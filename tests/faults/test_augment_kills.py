"""`kd augment` by any number of workers, of shuffled rows, and killed and run again: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).with_name("kill_augment.py")
SEED = int(os.environ.get("KD_FAULTS_SEED", "0"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.faults
def test_two_thousand_texts_times_twenty(tmp_path: Path, figures: Callable[..., None]) -> None:
    rng = np.random.default_rng(SEED)
    texts = [" ".join(rng.choice([f"word{i}" for i in range(500)], rng.integers(1, 20))) for _ in range(2000)]
    (tmp_path / "texts").mkdir()
    for name, rows in (("train", texts), ("validation", texts[::40])):
        pq.write_table(pa.table({"sentence": rows}), tmp_path / "texts" / f"{name}.parquet")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "texts"), "--label-column", "", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--kills", "5", "--seed", str(SEED), "--", "--preset", "tang"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["variants"] > 20_000 and found["corpora"] >= 6 and found["kills"] >= 5
    figures("kills of kd augment", seed=SEED, **{name: found[name] for name in found if name != "files"})
