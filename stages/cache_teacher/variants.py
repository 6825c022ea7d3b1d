"""What the teacher says of variants beside what it says of their originals: figures, and `report.md` of a view.

Dimension key: N rows of the corpus, V variants whose original is there too, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..augment.report import in_a_cell, shown
from ..corpus import Corpus
from ..metrics import decide, log_softmax, pearson

Array = npt.NDArray[Any]
Gather = Callable[[npt.NDArray[np.int64]], Array]
"""Gives the logits [B, C] of examples, by their numbers."""

REPORT = "report.md"
TASKS = ("single-label", "multi-label", "regression")
EXAMPLES = 3
"""Variants shown per operator."""
COMBINATIONS = 30
"""Sets of operators that the page has a line for."""
BLOCK_LOGITS = 1 << 22
"""Logits in memory at once."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What the teacher decided on N rows: a few bytes of each, whatever the number of classes.

    Attributes:
        decided: by task int64 [N] classes, uint8 [N, C / 8] the labels given as bits, or float64 [N] scores.
        confidence: float64 [N] probability of the class, mean over the labels of that of each decision; None for
            regression.
        num_classes: C; 1 for regression.
    """

    decided: Array
    confidence: npt.NDArray[np.float64] | None
    num_classes: int

    @classmethod
    def read(cls, gather: Gather, num_rows: int, task: str) -> Answers:
        """Of all examples, from their logits, block by block."""
        decided, confidence = [], []
        num_classes = gather(np.arange(1)).shape[-1]
        block = max(1, BLOCK_LOGITS // num_classes)
        for start in range(0, num_rows, block):
            logits_BC = np.asarray(gather(np.arange(start, min(start + block, num_rows))), np.float64)
            found = decide(task, logits_BC)
            decided.append(np.packbits(found.astype(bool), axis=1) if task == "multi-label" else found)
            if task == "single-label":
                confidence.append(np.exp(log_softmax(logits_BC).max(axis=1)))
            elif task == "multi-label":
                confidence.append((1.0 / (1.0 + np.exp(-np.abs(logits_BC)))).mean(axis=1))
        return cls(np.concatenate(decided), np.concatenate(confidence) if confidence else None, num_classes)

    def change(self, rows: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[K] 1 where the decisions on two rows differ in any class, else 0; for regression how far they are apart."""
        here, there = self.decided[rows], self.decided[others]
        if here.dtype.kind == "f":
            return np.asarray(np.abs(here - there))
        differ = here != there
        return np.asarray(differ.any(axis=1) if differ.ndim == 2 else differ, np.float64)


class TeacherOnVariants:
    """The figures of a corpus that has variants.

    Args:
        corpus: labels in the order of the teacher's.
        gather: gives the teacher's logits.

    Attributes:
        by_operator: figures of all variants that an operator changed, alone or with others, the most frequent first:
            `rows`; of those whose original is in the view `changed` (share with another decision, or mean absolute
            change of the score) and `confidence` (mean over the rows).
        by_aug_op: the same of the rows of each `aug_op` of the corpus.
        num_originals, num_variants: rows of each.
        num_orphans: variants whose original is not in the view: nothing to compare them with.
        num_gold: originals that have a gold label.
        agreement: share of the decisions on those that are the gold ones (per label for multi-label; the correlation
            for regression); None without any.
        confidence: mean over the originals; None for regression.
    """

    def __init__(self, corpus: Corpus, gather: Gather) -> None:
        self._corpus, table = corpus, corpus.table
        self._answers = Answers.read(gather, len(corpus), corpus.info.task)
        is_original = table["parent_id"].is_null().to_numpy()
        originals, variants = np.flatnonzero(is_original), np.flatnonzero(~is_original)
        self.num_originals, self.num_variants = len(originals), len(variants)
        place = pc.index_in(
            table["parent_id"].take(pa.array(variants)).combine_chunks(),
            value_set=table["example_id"].take(pa.array(originals)).combine_chunks(),
        )
        found = place.is_valid().to_numpy(zero_copy_only=False)
        self.num_orphans = len(variants) - int(found.sum())
        parents = originals[place.drop_null().to_numpy()]
        compared = variants[found]
        change_V = self._answers.change(compared, parents)

        names = table["aug_op"].take(pa.array(variants)).combine_chunks().cast(pa.string()).dictionary_encode()
        self._names: list[str] = names.dictionary.to_pylist()
        codes = names.indices.to_numpy()
        self.by_aug_op, self.by_operator = self._figures(codes, codes[found], change_V, variants)
        self._examples = self._most_sure(codes[found], change_V, compared, parents)
        self._of_originals(originals)

    def _figures(
        self, codes: Array, codes_V: Array, change_V: Array, variants: Array
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """By `aug_op`, and by operator."""
        size = len(self._names)
        sums = {"rows": np.bincount(codes, minlength=size), "compared": np.bincount(codes_V, minlength=size)}
        sums["changed"] = np.bincount(codes_V, change_V, minlength=size)
        if self._answers.confidence is not None:
            sums["confidence"] = np.bincount(codes, self._answers.confidence[variants], minlength=size)
        parts = [name.split("+") for name in self._names]
        operators = sorted({part for names in parts for part in names})
        takes_part = np.array([[part in names for names in parts] for part in operators]).reshape(-1, size)
        return (
            _ordered(self._names, sums),
            _ordered(operators, {name: takes_part @ numbers for name, numbers in sums.items()}),
        )

    def _most_sure(
        self, codes_V: Array, change_V: Array, compared: Array, parents: Array
    ) -> dict[str, list[tuple[int, int]]]:
        """Per operator `(original, variant)` of the changes that say most: those of which the teacher was surest both
        times, or the greatest; the operator's own come before those that it shares with others."""
        at = np.flatnonzero(change_V)
        sure = (
            change_V if self._answers.confidence is None else np.minimum(*self._answers.confidence[[compared, parents]])
        )
        at = at[np.argsort(-sure[at], kind="stable")]
        examples: dict[str, list[tuple[int, int]]] = {}
        for operator in self.by_operator:
            alone = np.array([name == operator for name in self._names])[codes_V[at]]
            mixed = np.array([operator in name.split("+") for name in self._names])[codes_V[at]] & ~alone
            chosen = np.concatenate([at[alone][:EXAMPLES], at[mixed][:EXAMPLES]])[:EXAMPLES]
            examples[operator] = [*zip(parents[chosen].tolist(), compared[chosen].tolist(), strict=True)]
        return examples

    def _of_originals(self, originals: Array) -> None:
        labels, has_gold = self._corpus.labels()
        gold = originals[has_gold[originals]]
        self.num_gold, self.agreement = len(gold), None
        if len(gold):
            decided = self._decisions(gold)
            is_score = self._corpus.info.task == "regression"
            same = pearson(decided, labels[gold]) if is_score else float(np.mean(decided == labels[gold]))
            self.agreement = round(same, 6)
        confidence = self._answers.confidence
        self.confidence = None if confidence is None else round(float(confidence[originals].mean()), 6)

    def _decisions(self, rows: Array) -> Array:
        decided = self._answers.decided[rows]
        if self._corpus.info.task != "multi-label":
            return decided
        return np.unpackbits(decided, axis=1, count=self._answers.num_classes)

    # For people and for the manifest ---------------------------------------------------------------------------------

    @property
    def _is_score(self) -> bool:
        return self._corpus.info.task == "regression"

    def summary(self) -> dict[str, Any]:
        """The figures of the stage: one mapping from operators to numbers for each."""
        changed = "variants_mean_change" if self._is_score else "variants_flipped"
        figures: dict[str, Any] = {
            "variants": self.num_variants,
            "variants_without_original": self.num_orphans,
            "variants_of": {name: figure["rows"] for name, figure in self.by_operator.items()},
            changed: {name: figure["changed"] for name, figure in self.by_operator.items()},
        }
        if not self._is_score:
            of_variants = {name: figure["confidence"] for name, figure in self.by_operator.items()}
            figures["mean_confidence"] = {"originals": self.confidence, **of_variants}
        if self.agreement is not None:
            figures |= {"originals_with_gold": self.num_gold, "agreement_with_gold": self.agreement}
        return figures

    def content(self) -> dict[str, Any]:
        """For the manifest: the figures by every set of operators, too."""
        return {"by_operator": self.by_operator, "by_aug_op": self.by_aug_op, **self.summary()}

    def text(self) -> str:
        """The page."""
        lines = ["# The teacher on variants", "", f"{self.num_originals:,} originals, {self.num_variants:,} variants."]
        if self.num_orphans:
            lines[-1] += f" The originals of {self.num_orphans:,} variants are not among these rows."
        if self.agreement is not None:
            measure = "its correlation with them is" if self._is_score else "it agrees with"
            agreement = f"{self.agreement:.3f}" if self._is_score else f"{self.agreement:.1%}"
            lines += ["", f"Of {self.num_gold:,} originals the gold label is known: {measure} {agreement}."]
        lines += ["", *self._table("operator", self.by_operator, with_originals=True)]
        lines += ["", "A row that two operators changed counts for both."]
        if not self._is_score:
            lines[-1] += (
                " A teacher that often decides otherwise sees another meaning: its logits say so, while the label of "
                "the original would be wrong."
            )
        if any("+" in name for name in self.by_aug_op):
            lines += ["", *self._table("changed by exactly", self.by_aug_op)]
        for name, pairs in self._examples.items():
            if pairs:
                lines += ["", f"## {name}", "", "| original | teacher | variant | teacher |", "|---|---|---|---|"]
                lines += [f"| {self._side(old)} | {self._side(new)} |" for old, new in pairs]
        return "\n".join(lines) + "\n"

    def _table(self, what: str, figures: Mapping[str, Mapping[str, Any]], *, with_originals: bool = False) -> list[str]:
        changed = "mean change of the score" if self._is_score else "another decision than on the original"
        heads = [what, "rows", changed, *([] if self._is_score else ["mean confidence"])]
        rows = [(name, figure["rows"], figure["changed"], figure["confidence"]) for name, figure in figures.items()]
        if with_originals:
            rows.insert(0, ("(originals)", self.num_originals, None, self.confidence))
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for name, number, change, confidence in rows[: COMBINATIONS + with_originals]:
            shown_change = "" if change is None else f"{change:.4g}" if self._is_score else f"{change:.1%}"
            cells = [name, f"{number:,}", shown_change]
            cells += [] if self._is_score else ["" if confidence is None else f"{confidence:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
        rest = rows[COMBINATIONS + with_originals :]
        if rest:
            others = f"{len(rest)} more sets of operators"
            lines.append(f"| {others} | {sum(row[1] for row in rest):,} |" + " |" * (len(heads) - 2))
        return lines

    def _side(self, row: int) -> str:
        """Two cells: a row, and what the teacher says of it."""
        return f"{shown(self._corpus.table.slice(row, 1))} | {in_a_cell(self._said(row))}"

    def _said(self, row: int) -> str:
        if self._answers.confidence is None:
            return f"{self._answers.decided[row]:.4g}"
        names: Sequence[str] = self._corpus.info.label_names
        decided = self._decisions(np.array([row]))[0]
        given = np.flatnonzero(decided).tolist() if np.ndim(decided) else [int(decided)]
        said = ", ".join(names[number] if number < len(names) else f"class {number}" for number in given)
        return f"{said or 'no label'} ({self._answers.confidence[row]:.3f})"


def _ordered(names: Sequence[str], sums: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Figures by name, the most frequent first, from sums over rows."""
    figures: dict[str, dict[str, Any]] = {}
    for number in sorted(range(len(names)), key=lambda number: (-int(sums["rows"][number]), names[number])):
        rows, compared = int(sums["rows"][number]), int(sums["compared"][number])
        figures[names[number]] = {
            "rows": rows,
            "changed": round(float(sums["changed"][number]) / compared, 6) if compared else None,
            "confidence": round(float(sums["confidence"][number]) / rows, 6) if "confidence" in sums else None,
        }
    return figures
