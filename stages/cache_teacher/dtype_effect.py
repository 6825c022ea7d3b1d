"""What computing in fewer bits does to the teacher's logits, measured on a few rows before a capture."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...pipeline.ragged import Ragged
from ...pipeline.store import Signal
from .capture import CaptureJob
from .teacher import Teacher

Array = npt.NDArray[Any]

SAMPLE_ROWS = 256
SAMPLE_TOKENS = 8192
"""What the sample takes at most: two forward passes over so many tokens, one of them in float32."""


def measure_dtype_effect(job: CaptureJob, teacher: Teacher, shard: int) -> dict[str, Any]:
    """Run rows of a shard in the job's dtype and in float32: how far apart the logits are.

    Returns:
        `effect_on_logits` of the two, with `dtype` and `rows`.
    """
    from .capture import LoadedTeacher

    held = job.store.read_tokens(shard)
    chosen = sample(held.token_ids.lengths)
    rows = held.token_ids.take(chosen), held.segment_ids.take(chosen)
    exact = LoadedTeacher(teacher, teacher.load("float32"), job.device)
    teacher.unload()  # a checkpoint in float32 was kept for the next who asks
    signal = Signal("logits.tok" if teacher.tags_tokens else "logits")
    logits = [
        _logits(loaded, signal, *rows, job.store.layout.batch_tokens)
        for loaded in (exact.runner({signal: "float32"}), job.runner({signal: "float32"}))
    ]
    # Every token is one decision.
    task = "single-label" if teacher.tags_tokens else teacher.task or ""
    return {"dtype": job.dtype, "rows": len(chosen), **effect_on_logits(*logits, task=task)}


def sample(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows spread evenly over those that are there, at most SAMPLE_ROWS and SAMPLE_TOKENS and at least one."""
    count = min(len(lengths), SAMPLE_ROWS)
    while count > 1:
        chosen = np.linspace(0, len(lengths) - 1, count).astype(np.int64)
        if lengths[chosen].sum() <= SAMPLE_TOKENS:
            return chosen
        count //= 2
    return np.zeros(1, dtype=np.int64)


def effect_on_logits(exact_BC: Array, found_BC: Array, *, task: str) -> dict[str, float]:
    """How logits [B, C] differ from those in float32; distances are of the distributions at temperature 1, in nats.

    Args:
        task: "single-label": `agreement` is the share of rows with the same highest logit, `kl_max` and `kl_mean` are
            of KL(float32 || found). "multi-label": the share of labels on the same side of zero, and the KL of each
            row's labels together. Else neither; `difference_max` (of any logit) is always there.
    """
    exact, found = exact_BC.astype(np.float64), found_BC.astype(np.float64)
    effect = {"difference_max": float(np.abs(exact - found).max())}
    if task == "single-label":
        exact, found = (rows - np.logaddexp.reduce(rows, axis=1, keepdims=True) for rows in (exact, found))
        divergence_B = (np.exp(exact) * (exact - found)).sum(axis=1)
        same = exact.argmax(axis=1) == found.argmax(axis=1)
    elif task == "multi-label":
        # log p = -log(1 + exp(-x)) and log(1 - p) = -log(1 + exp(x))
        divergence_B = sum(
            np.exp(-np.logaddexp(0, sign * exact)) * (np.logaddexp(0, sign * found) - np.logaddexp(0, sign * exact))
            for sign in (-1, 1)
        ).sum(axis=1)
        same = (exact > 0) == (found > 0)
    else:
        return effect
    # Of equal distributions, rounding can leave less than nothing.
    divergence_B = np.maximum(divergence_B, 0.0)
    return {
        "agreement": float(same.mean()),
        "kl_max": float(divergence_B.max()),
        "kl_mean": float(divergence_B.mean()),
        **effect,
    }


def describe_effect(effect: dict[str, Any]) -> str:
    """One line for people."""
    where = f"{effect['dtype']} against float32 on {effect['rows']} rows"
    if "agreement" not in effect:
        return f"{where}: logits differ by at most {effect['difference_max']:.2g}"
    return (
        f"{where}: {effect['agreement']:.2%} of decisions are the same, "
        f"KL {effect['kl_mean']:.2g} nats on average and {effect['kl_max']:.2g} at most"
    )


def _logits(runner: Any, signal: Signal, token_ids: Ragged, segment_ids: Ragged, batch_tokens: int) -> Array:
    """[rows, C], or [tokens, C], in the order of the batches, which follows from the rows."""
    from .runner import plan_batches

    batches = runner.run(token_ids, segment_ids, plan_batches(token_ids.lengths, batch_tokens))
    return np.concatenate([batch.values[signal] for batch in batches])
