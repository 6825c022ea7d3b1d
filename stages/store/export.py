"""`kd store export`: what a store or a view holds, as a dataset that other tools open."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.artifact import atomic_write_bytes, read_manifest
from ...pipeline.errors import RefusedError, UsageError
from ...pipeline.progress import size
from ...pipeline.stage import Stage, StageContext, StageResult, option

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Features

    from ...pipeline.store import Signal, StoreReader, TeacherStore, View

DEFAULT_K = 8


@dataclass(frozen=True, kw_only=True)
class ExportStore(Stage):
    """Writes the rows of a view, or all rows of a store, as Parquet with a dataset card."""

    command: ClassVar[str] = "store export"
    kind: ClassVar[str] = "export"
    on_interrupt: ClassVar[str] = "the same command writes the files anew"

    source: str = option(help="A view, with its corpus; or a store.", positional=True, metavar="SOURCE")
    format: str = option(
        "datasets",
        help="datasets: every column and signal. topk: the largest logits, as other distillation tools read them.",
        choices=("datasets", "topk"),
        metavar="FORMAT",
    )
    signals: str | None = option(None, help="As for kd cache-teacher; what the view was made with.", metavar="LIST")
    k: int | None = option(None, help="Logits per row of topk; 8, or all where there are fewer.", metavar="K")
    output_dir: str = option(help="Folder of the dataset.", metavar="DIR")

    def __post_init__(self) -> None:
        if self.k is not None and self.format != "topk":
            raise UsageError("--k goes with --format topk")
        if self.k is not None and self.k < 1:
            raise UsageError(f"--k {self.k}: at least one logit is needed")
        if self.format == "topk" and self.signals not in (None, "logits"):
            raise UsageError("--format topk holds logits alone", fix="leave --signals out, or use --format datasets")

    def inputs(self) -> dict[str, str]:
        """What is exported: the view or the state of the store, and the encoding of every signal."""
        from ...pipeline.store.signal import format_signals

        source = self._view.fingerprint if self._view is not None else self._store.digest()
        return {"source": source, "signals": format_signals(self._signals)}

    # --- what there is -------------------------------------------------------------------------------------------

    @cached_property
    def _view(self) -> View | None:
        from ...pipeline.store import open_view

        manifest = None if "://" in self.source else read_manifest(self.source)
        return open_view(self.source) if manifest is not None and manifest["kind"] == "view" else None

    @cached_property
    def _store(self) -> TeacherStore:
        from ...pipeline.store import open_store

        return self._view.store if self._view is not None else open_store(self.source)

    @cached_property
    def _reader(self) -> StoreReader:
        return self._view.reader if self._view is not None else self._store.reader()

    @cached_property
    def _rows(self) -> np.ndarray:
        import numpy as np

        if self._view is not None:
            return self._view.rows
        width = self._store.layout.rows_per_shard
        shards = self._store.catalogue().allocations
        return np.concatenate(
            [np.empty(0, np.int64), *(shard.shard * width + np.arange(shard.rows) for shard in shards)]
        )

    @cached_property
    def _signals(self) -> tuple[Signal, ...]:
        """The signals to write; each in one encoding where one covers all rows."""
        from ...pipeline.store import SIGNALS, Signal, parse_signals

        reader = self._reader
        held = [spec.signal for spec in reader.catalogue.specs.values() if spec.signal.name in SIGNALS]
        if self.format == "topk":
            wanted: tuple[Signal, ...] = (Signal("logits"),)
        elif self.signals is not None:
            layers = [signal.layer for signal in held if signal.layer is not None]
            wanted = parse_signals(self.signals, max(layers, default=0))
        elif self._view is not None:
            wanted = tuple(dict.fromkeys(signal.bare for signal in self._view.signals))
        else:
            wanted = tuple(dict.fromkeys(held))
        self._require(wanted)
        return tuple(dict.fromkeys(self._encoded(signal) for signal in wanted))

    def _require(self, signals: tuple[Signal, ...]) -> None:
        if self._view is not None:
            self._view.check_coverage(signals)
            return
        for signal in signals:
            if not (held := self._reader.has(signal, self._rows)).all():
                raise RefusedError(
                    f"store {self.source} holds {signal} for {int(held.sum())} of {len(held)} rows",
                    fix="export a view, or leave the signal out with --signals",
                )

    def _encoded(self, signal: Signal) -> Signal:
        """The signal in the encoding that will be read; as it is where shards are read in different ones."""
        if signal.encoding is not None:
            return signal
        pinned = {} if self._view is None else self._view.encodings
        encodings = [pinned[signal]] if signal in pinned else []
        encodings += [group[0].encoding for group in self._reader.catalogue.stored(signal)]
        for encoding in encodings:
            if self._reader.has(replace(signal, encoding=encoding), self._rows).all():
                return replace(signal, encoding=encoding)
        return signal

    def _top_k(self) -> int:
        labels = self._reader.spec("logits").shape[0]
        if self.k is not None and self.k > labels:
            raise UsageError(f"--k {self.k}: the teacher has {labels} labels", fix=f"give at most {labels}")
        return self.k or min(DEFAULT_K, labels)

    # --- the work ------------------------------------------------------------------------------------------------

    def run(self, context: StageContext) -> StageResult:
        from .export_card import card
        from .export_tables import SplitFiles

        folder = Path(self.output_dir)
        # Left by a run that was killed; these names are this stage's alone.
        shutil.rmtree(folder / "data", ignore_errors=True)
        features: Features | None = None
        files: dict[str, SplitFiles] = {}
        task = context.progress.task("exporting", total=len(self._rows), unit="rows")
        for splits, table in self._tables():
            if features is None:
                features = self._features(table.schema)
            for split in dict.fromkeys(splits):
                if split not in files:
                    files[split] = SplitFiles(folder, split, features.arrow_schema)
                mine = [index for index, name in enumerate(splits) if name == split]
                files[split].write(table if len(mine) == len(table) else table.take(mine))
            task.advance(len(table))
        task.done()
        if features is None:
            raise RefusedError(f"{self.source} holds no rows", fix="capture something first: kd cache-teacher")
        named = {split: files[split].finish() for split in sorted(files)}
        text = card(features, {split: [*names] for split, names in named.items()}, self._store.identity,
                    self._about(), len(self._rows))  # fmt: skip
        atomic_write_bytes(folder / "README.md", text.encode())
        rows = {split: sum(names.values()) for split, names in named.items()}
        written = sum((folder / name).stat().st_size for names in named.values() for name in names)
        summary = {
            "rows": sum(rows.values()),
            "splits": rows,
            "files": sum(map(len, named.values())),
            "bytes": written,
            "signals": [str(signal) for signal in self._signals],
        }
        content = {
            "format": self.format,
            "files": {name: count for names in named.values() for name, count in names.items()},
            "columns": [*features],
            "signals": [str(signal) for signal in self._signals],
            "store_digest": self._store.store_digest,
        }
        return StageResult(summary=summary, content=content)

    def report(self, summary: Mapping[str, Any]) -> str:
        splits = ", ".join(f"{split} {rows:,}" for split, rows in summary["splits"].items())
        return (
            f"store export → {self.output_dir}: {summary['rows']:,} rows ({splits}) in {summary['files']} files, "
            f"{size(summary['bytes'])}\n  open with: datasets.load_dataset({self.output_dir!r})"
        )

    def _tables(self) -> Iterator[tuple[list[str], pa.Table]]:
        """Blocks of rows in order, each with the split of every row; what is in memory is one block."""
        import pyarrow as pa

        from ..masking import Masking
        from .export_tables import blocks, column_names, input_columns, signal_column, top_columns

        reader, names = self._reader, column_names(self._signals)
        masking = Masking.from_capture(self._store.identity.capture)
        k = self._top_k() if self.format == "topk" else 0
        for splits, head, rows in self._heads():
            for part in blocks(reader, self._signals, rows):
                mine = rows[part]
                columns = {name: head.column(name).slice(part.start, len(mine)) for name in head.column_names}
                columns |= input_columns(reader, mine, mask=bool(k), masking=masking)
                if k:
                    columns |= top_columns(reader.gather(self._signals[0], mine), k)
                else:
                    columns |= {names[signal]: signal_column(reader, signal, mine) for signal in self._signals}
                yield splits[part], pa.table(columns)

    def _heads(self) -> Iterator[tuple[list[str], pa.Table, np.ndarray]]:
        """Per part of the rows: their splits, the columns that are not the store's, and their row numbers."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ...pipeline.store.keys import keys_to_arrow
        from ...pipeline.store.view import EXAMPLES
        from .export_tables import plain_columns

        if self._view is None:
            width = self._store.layout.rows_per_shard
            for shard in self._store.catalogue().allocations:
                rows = self._rows[self._rows // width == shard.shard]
                keys = plain_columns(pa.table({"row_key": keys_to_arrow(self._reader.row_keys(rows))}))
                yield ["train"] * len(rows), keys, rows
            return
        for batch in pq.ParquetFile(self._view.path / EXAMPLES).iter_batches(4096):
            table = plain_columns(pa.table(batch))
            rows = table.column("row").to_numpy()
            splits = table.column("split").to_pylist() if "split" in table.column_names else [None] * len(table)
            kept = [name for name in table.column_names if name not in ("row", "split")]
            if self.format == "topk":
                kept = [name for name in kept if name == "example_id"]
            yield [_split_name(split) for split in splits], table.select(kept), rows

    def _features(self, schema: pa.Schema) -> Features:
        """Types as `datasets` names them; labels with the names of their classes."""
        from datasets import ClassLabel, Features

        features = Features.from_arrow_schema(schema)
        names = [] if self._view is None else [*self._view.info.get("label_names", ())]
        if "label_gold" in features and names:
            features["label_gold"] = ClassLabel(names=names)
        return features

    def _about(self) -> dict[str, tuple[str, str]]:
        from ...pipeline.store.signal import ENCODINGS
        from .export_tables import column_names

        if self.format == "topk":
            return {}
        found = {}
        for signal, column in column_names(self._signals).items():
            held = [group[0].encoding for group in self._reader.catalogue.stored(signal)]
            errors = [ENCODINGS[encoding].error for encoding in held]
            text = str(signal) if signal.encoding else f"{signal} ({' or '.join(held)})"
            found[column] = (text, " or ".join(errors))
        return found


def _split_name(split: str | None) -> str:
    """A split as `datasets` allows it: a word."""
    return re.sub(r"\W", "_", split) if split else "train"
