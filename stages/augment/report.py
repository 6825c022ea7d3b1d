"""What an augmentation did, for people: `report.md` in the folder of the corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .operators import GENERATORS, OPERATORS

REPORT = "report.md"
_ALL = (*OPERATORS, *GENERATORS)
EXAMPLES = 3
"""Variants shown per operator."""


class Report:
    """Sees the variants of a corpus, chunk by chunk, and keeps numbers and a few examples.

    Attributes:
        rows: variants that each operator changed; one changed by two counts for both.
    """

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        # By operator: variants that it alone changed, and variants that others changed too.
        self._alone: dict[str, list[tuple[str, str]]] = {name: [] for name in _ALL}
        self._mixed: dict[str, list[tuple[str, str]]] = {name: [] for name in _ALL}

    def see(self, variants: pa.Table, originals: pa.Table) -> None:
        """Take the variants that stay of some originals."""
        column = variants["aug_op"].cast(pa.string())
        for entry in column.value_counts().to_pylist():
            names = entry["values"].split("+")
            self.rows.update(dict.fromkeys(names, entry["counts"]))
            for name in names:
                kept = (self._alone if len(names) == 1 else self._mixed)[name]
                if len(kept) < EXAMPLES:
                    found = np.flatnonzero(pc.equal(column, entry["values"]).to_numpy())[: EXAMPLES - len(kept)]
                    kept += [self._example(variants.slice(row, 1), originals) for row in found.tolist()]

    @staticmethod
    def _example(variant: pa.Table, originals: pa.Table) -> tuple[str, str]:
        parent = originals.filter(pc.equal(originals["example_id"], variant["parent_id"][0]))
        return shown(parent), shown(variant)

    def text(self, summary: Mapping[str, Any]) -> str:
        """The page, from what was seen and the summary of the stage."""
        lines = [
            "# Augmentation",
            "",
            f"{summary['originals']:,} originals, {summary['variants_made']:,} variants made, "
            f"{summary['variants']:,} kept.",
            "",
            "| operator | rows it changed | places it was drawn for | of them left as they were |",
            "|---|---:|---:|---:|",
        ]
        for name, change in summary["changes"].items():
            places = next(change[unit] for unit in ("words", "texts", "mentions") if unit in change)
            lines.append(f"| {name} | {self.rows[name]:,} | {places:,} | {change.get('stayed', 0):,} |")
        lines += ["", "A row that two operators changed counts for both.", "", "| left out | rows |", "|---|---:|"]
        lines += [f"| {name} | {count:,} |" for name, count in summary["variants_dropped"].items()]
        lines += [f"| original: {name} | {summary[name]:,} |" for name in ("empty_dropped", "leaks_dropped")]
        for name in _ALL:
            shown = [*self._alone[name], *self._mixed[name]][:EXAMPLES]
            if shown:
                lines += ["", f"## {name}", "", "| original | variant |", "|---|---|"]
                lines += [f"| {old} | {new} |" for old, new in shown]
        return "\n".join(lines) + "\n"


def shown(row: pa.Table) -> str:
    """The texts of one row of a corpus, in a cell of a table."""
    texts = [row[name][0].as_py() for name in ("text_a", "text_b")]
    return in_a_cell(" // ".join(text for text in texts if text is not None))


def in_a_cell(text: str) -> str:
    """Text that cannot end the cell of a Markdown table, and is not too long for one."""
    return " ".join((text if len(text) <= 300 else f"{text[:300]} ...").split()).replace("|", "\\|")
