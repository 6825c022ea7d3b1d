"""`kd augment`: a dataset becomes a corpus, with variants of its texts for the teacher to label."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import IncompleteError, KdError, RefusedError, UsageError, near_match
from ...pipeline.executor import ShardJob, check_execution, cluster_option, map_shards, workers_option
from ...pipeline.fingerprint import fingerprint
from ...pipeline.stage import Progress, Stage, StageContext, StageResult, option
from ..corpus import DatasetSource

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ..corpus import Corpus
    from .generate import Plan

OPERATORS = ("mask", "pos", "ngram")
PRESETS: dict[str, dict[str, Any]] = {
    # Tang et al., 2019, as in the paper.
    "tang": {"num_variants": 20, "mask": 0.1, "pos": 0.1, "ngram": 0.25, "pair_sides": "cycle"},
    # castorini/d-bert, what its scripts do by default: no window; one side of a pair or both by a draw.
    "d-bert": {"num_variants": 20, "mask": 0.1, "pos": 0.1, "ngram": 0.0, "pair_sides": "random"},
}
_DEFAULTS = {**PRESETS["tang"], "num_variants": 3}
WORK_FOLDER = "work"
VARIANTS_PER_CHUNK = 1 << 15
_SOURCE = "Source"
_LABELS = "Labels"
_OPERATORS = "Operators"
_LEAKAGE = "Test data"
_EXECUTION = "Execution"


@dataclass(frozen=True, kw_only=True)
class Augment(Stage):
    """Import a dataset and add variants of its texts (Tang et al., 2019): masked words, other words, short windows.

    Originals come first and keep their labels; variants carry none, since the teacher labels them.
    """

    command: ClassVar[str] = "augment"
    kind: ClassVar[str | None] = "corpus"
    on_interrupt: ClassVar[str] = "finished chunks are kept; the same command goes on from there"

    dataset: str = option(help="Dataset D[:split]: a file, a dataset folder or a hub id.", panel=_SOURCE)
    text_column: str = option(help="Column of the text, or of the first text of a pair.", panel=_SOURCE)
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.", panel=_SOURCE)
    label_column: str | None = option(None, help="Column of the gold label.", panel=_SOURCE)
    task: str | None = option(
        None,
        help="What the label is, where its column does not say.",
        panel=_SOURCE,
        choices=("single-label", "multi-label", "regression"),
    )
    transfer_dataset: tuple[str, ...] = option((), help="Further text D[:split], joined without labels.", panel=_SOURCE)
    transfer_text_column: str | None = option(
        None, help="Its text column; --text-column when not given.", panel=_SOURCE
    )
    transfer_text_pair_column: str | None = option(
        None, help="Its second text column; --text-pair-column when not given.", panel=_SOURCE
    )

    labels_per_class: int | None = option(None, help="Keep so many labels per class, hide the others.", panel=_LABELS)
    labels_total: int | None = option(None, help="Keep so many labels in all, hide the others.", panel=_LABELS)
    label_seed: int = option(0, help="Which labels are kept.", panel=_LABELS)

    operators: tuple[str, ...] = option(
        OPERATORS, help="Rule operators: mask, pos, ngram; none only imports.", panel=_OPERATORS
    )
    num_variants: int | None = option(
        None, help="Variants tried per original; 3, or what the preset says.", panel=_OPERATORS
    )
    preset: str | None = option(
        None, help="Published settings for what is not given: tang, d-bert.", panel=_OPERATORS, choices=tuple(PRESETS)
    )
    mask_probability: float | None = option(
        None, help="mask: a word becomes the mask token with this probability; 0.1.", panel=_OPERATORS
    )
    pos_probability: float | None = option(
        None, help="pos: a word becomes another of its part of speech; 0.1.", panel=_OPERATORS
    )
    ngram_probability: float | None = option(
        None, help="ngram: only a window of 1 to 5 words is kept; 0.25.", panel=_OPERATORS
    )
    mask_token: str = option("[MASK]", help="The teacher's mask token.", panel=_OPERATORS, choices=("[MASK]", "<mask>"))
    keep_all_masked: bool = option(False, help="Keep variants in which every word is masked.", panel=_OPERATORS)
    pair_sides: str | None = option(
        None,
        help="Text of a pair that a variant changes: first, second, both in turn (cycle) or by chance (random).",
        panel=_OPERATORS,
        choices=("cycle", "random"),
    )
    tagger: str = option(
        "auto",
        help="Part-of-speech tagger of pos; auto takes HanTa where it is installed.",
        panel=_OPERATORS,
        choices=("auto", "hanta", "heuristic"),
    )
    language: str = option("en", help="Language of the text, for the tagger: en, de, nl.", panel=_OPERATORS)
    seed: int = option(42, help="Seed of the operators.", panel=_OPERATORS)

    exclude_dataset: tuple[str, ...] = option(
        (),
        help="Datasets D:split whose texts must not appear; evaluation splits beside --dataset always count.",
        panel=_LEAKAGE,
    )

    workers: int = workers_option(_EXECUTION)
    cluster: str | None = cluster_option(_EXECUTION)
    output_dir: str = option(help="Folder of the corpus.")

    # Configuration -----------------------------------------------------------------------------------------------

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The operator settings after presets and defaults.

        Raises:
            UsageError: an unknown operator or preset, or a number out of its range.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"preset {self.preset!r} does not exist{near_match(self.preset, PRESETS)}")
        chosen = [name for name in self.operators if name != "none"]
        for name in chosen:
            if name not in OPERATORS:
                raise UsageError(f"operator {name!r} does not exist{near_match(name, (*OPERATORS, 'none'))}")
        if chosen and "none" in self.operators:
            raise UsageError(f"operators {','.join(self.operators)}: 'none' stands alone")
        values = {**_DEFAULTS, **(PRESETS[self.preset] if self.preset else {})}
        given = {
            "num_variants": self.num_variants,
            "mask": self.mask_probability,
            "pos": self.pos_probability,
            "ngram": self.ngram_probability,
            "pair_sides": self.pair_sides,
        }
        values.update({name: value for name, value in given.items() if value is not None})
        for name in OPERATORS:
            if name not in chosen:
                if given[name]:
                    raise UsageError(
                        f"--{name}-probability {given[name]} is given, and operator {name!r} is not among --operators",
                        fix=f"add {name} to --operators, or leave the probability out",
                    )
                values[name] = 0.0
            if not 0.0 <= values[name] <= 1.0:
                raise UsageError(f"--{name}-probability is {values[name]}; expected a number from 0 to 1")
        if values["mask"] + values["pos"] > 1.0:
            raise UsageError(
                f"--mask-probability {values['mask']} and --pos-probability {values['pos']} sum to more than 1",
                details=["a word is masked or replaced, not both"],
            )
        if not 0 <= values["num_variants"] < 1 << 15:
            raise UsageError(f"--num-variants is {values['num_variants']}; expected a number from 0 to 32767")
        if not chosen or not any(values[name] for name in OPERATORS):
            values["num_variants"] = 0
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed} does not fit into 64 bits")
        return values

    @cached_property
    def tagger_identity(self) -> dict[str, str] | None:
        """Name, version and model of the tagger; None when no operator needs one."""
        from .tagger import tagger_identity

        needed = self.resolved["num_variants"] > 0 and self.resolved["pos"] > 0
        return tagger_identity(self.tagger, self.language) if needed else None

    def identity_config(self) -> dict[str, Any]:
        """The fields that change the result, presets resolved; what an unused operator is set to does not count."""
        config = super().identity_config()
        resolved = self.resolved
        for name in ("preset", "operators", "tagger", "language"):
            del config[name]
        config["num_variants"] = resolved["num_variants"]
        config["pair_sides"] = resolved["pair_sides"]
        for name in OPERATORS:
            config[f"{name}_probability"] = resolved[name]
        unused = []
        if not resolved["num_variants"]:
            unused += ["pair_sides", "mask_token", "keep_all_masked", "seed"]
            unused += [f"{name}_probability" for name in OPERATORS]
        if not self.transfer_dataset:
            unused += ["transfer_text_column", "transfer_text_pair_column"]
        if self.labels_per_class is None and self.labels_total is None:
            unused.append("label_seed")
        return {name: value for name, value in config.items() if name not in unused}

    # Inputs ------------------------------------------------------------------------------------------------------

    @property
    def _source(self) -> DatasetSource:
        return DatasetSource(
            dataset=self.dataset,
            text_column=self.text_column,
            text_pair_column=self.text_pair_column,
            label_column=self.label_column,
            task=self.task,
        )

    @cached_property
    def _labelled(self) -> Corpus:
        """The rows of the dataset, labels hidden."""
        from ..corpus.corpus import load_corpus
        from ..corpus.labels import hide_labels

        return hide_labels(
            load_corpus(self._source),
            labels_per_class=self.labels_per_class,
            labels_total=self.labels_total,
            label_seed=self.label_seed,
        )

    @cached_property
    def _originals(self) -> Corpus:
        """The rows of the dataset and the transfer text."""
        from ..corpus.corpus import join_unlabelled, load_corpus

        transfer = [
            load_corpus(
                DatasetSource(
                    dataset=dataset,
                    text_column=self.transfer_text_column or self.text_column,
                    text_pair_column=self.transfer_text_pair_column or self.text_pair_column,
                )
            )
            for dataset in self.transfer_dataset
        ]
        return join_unlabelled(self._labelled, transfer)

    @cached_property
    def _excluded(self) -> tuple[set[bytes], list[dict[str, Any]]]:
        """Keys of the texts that must not appear, and where they come from."""
        from ..corpus.corpus import load_corpus
        from ..corpus.files import evaluation_splits
        from .dedup import forbidden_keys

        used = {self.dataset, *self.transfer_dataset}
        automatic = [split for split in evaluation_splits(*self._source.located()) if split not in used]
        keys: set[bytes] = set()
        records: list[dict[str, Any]] = []
        for dataset in dict.fromkeys((*self.exclude_dataset, *automatic)):
            source = DatasetSource(
                dataset=dataset, text_column=self.text_column, text_pair_column=self.text_pair_column
            )
            record: dict[str, Any] = {
                "dataset": dataset if "://" in dataset else Path(dataset).name,
                "given": dataset in self.exclude_dataset,
            }
            records.append(record)
            try:
                corpus = load_corpus(source)
            except KdError as error:
                if record["given"]:
                    raise
                record["not_checked"] = error.what
                continue
            record["rows"] = len(corpus)
            keys |= forbidden_keys(*corpus.texts())
        return keys, records

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the rows, of the texts to avoid and of the tagger; reads and checks all of them."""
        check_execution(self.workers, self.cluster)
        num_variants, tagger = self.resolved["num_variants"], self.tagger_identity
        found = {"dataset": self._labelled.fingerprint}
        if self.transfer_dataset:
            found["transfer_dataset"] = self._originals.fingerprint
        keys, _ = self._excluded
        found["exclude_dataset"] = blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest()
        if num_variants:
            from .draws import AUG_VERSION
            from .words import WORDS_VERSION

            found["aug_version"] = f"{AUG_VERSION}, words {WORDS_VERSION}"
        if tagger is not None:
            found["tagger"] = fingerprint(tagger)
        return found

    # Work --------------------------------------------------------------------------------------------------------

    def run(self, context: StageContext) -> StageResult:
        """Write the corpus: originals in their order, then variants in the order of their originals."""
        import numpy as np
        import pyarrow as pa

        from ..corpus.corpus import write_tables
        from .draws import AUG_VERSION
        from .generate import ORIGINALS, pools_of, read_arrow, with_keys, write_arrow
        from .words import WORDS_VERSION

        self._say_what_is_not_checked(context.progress)
        forbidden, excluded = self._excluded
        originals, keys = with_keys(self._originals.table)
        leaks = np.array([key in forbidden for key in keys])
        if leaks.all():
            raise RefusedError(
                f"every row of {self.dataset} also stands in a dataset that is excluded",
                details=[f"excluded: {record['dataset']} ({record.get('rows', 0)} rows)" for record in excluded],
                fix="give other --exclude-dataset",
            )
        folder = Path(self.output_dir)
        work = folder / WORK_FOLDER
        work.mkdir(parents=True, exist_ok=True)
        # After a kill the rows of the first attempt count: the dataset may have been put in another order since.
        if not (work / ORIGINALS).exists():
            write_arrow(originals.filter(pa.array(~leaks)), work / ORIGINALS)
        originals = read_arrow(work / ORIGINALS)

        plan = self._plan(work.resolve(), len(originals), forbidden)
        made: Counter[str] = Counter()
        kept: list[np.ndarray] = []
        if plan is not None:
            self._do_chunks(plan, context.progress)
            made, kept = _compared(plan, np.array(keys, dtype="S16")[~leaks])
        has_gold = originals["has_gold"].combine_chunks().true_count
        num_variants = sum(int(keep.sum()) for keep in kept)
        summary = {
            "rows": len(originals) + num_variants,
            "originals": len(originals),
            "variants": num_variants,
            "labelled": has_gold,
            "unlabelled": len(originals) - has_gold,
            **{k: v for k, v in self._originals.counts.items() if k not in ("rows", "labelled", "unlabelled")},
            "leaks_dropped": int(leaks.sum()),
        }
        if plan is not None:
            summary |= _figures(made)
        content = write_tables(
            _all_rows(originals, plan, kept),
            folder,
            info=self._originals.info,
            num_rows=_rows_per_split(originals, plan, kept),
            counts=summary,
        )
        content["excluded"] = excluded
        if plan is not None:
            pools = pools_of(plan)
            content["augmentation"] = {
                "aug_version": AUG_VERSION,
                "words_version": WORDS_VERSION,
                "config_hash": plan.rules.config_hash.hex(),
                "settings": self.resolved,
                "seed": self.seed,
                "tagger": self.tagger_identity,
                "pools": {
                    "digest": pools.digest,
                    "tags": len(pools.words),
                    "words": sum(map(len, pools.words.values())),
                    "tags_with_one_word": sum(len(words) == 1 for words in pools.words.values()),
                    "expected_identical_rate": round(pools.identical_rate(), 6),
                },
            }
        shutil.rmtree(work)
        return StageResult(summary=summary, content=content)

    def _say_what_is_not_checked(self, progress: Progress) -> None:
        for record in self._excluded[1]:
            if "not_checked" in record:
                progress.warn(f"{record['dataset']} is not checked for leakage: {record['not_checked']}")
        if self.tagger == "auto" and (self.tagger_identity or {}).get("name") == "heuristic":
            progress.warn(
                "HanTa is not installed: parts of speech come from a heuristic, and variants differ from those with it "
                '(pip install "kd-pipeline[offline]"; --tagger heuristic takes it without this warning)'
            )

    def _plan(self, work: Path, num_rows: int, forbidden: set[bytes]) -> Plan | None:
        """What to generate; None when there is nothing."""
        from ...pipeline.artifact import atomic_write_bytes
        from .generate import FORBIDDEN, Plan
        from .rules import Rules

        if not self.resolved["num_variants"]:
            return None
        atomic_write_bytes(work / FORBIDDEN, b"".join(sorted(forbidden)))
        return Plan(
            folder=work,
            digest=fingerprint(self.inputs()),
            num_rows=num_rows,
            rows_per_chunk=max(1, VARIANTS_PER_CHUNK // self.resolved["num_variants"]),
            task=self._originals.info.task,
            tagger=self.tagger_identity["name"] if self.tagger_identity else None,
            language=self.language,
            rules=Rules(
                mask_probability=self.resolved["mask"],
                pos_probability=self.resolved["pos"],
                ngram_probability=self.resolved["ngram"],
                mask_token=self.mask_token,
                pair_sides=self.resolved["pair_sides"],
            ),
            num_variants=self.resolved["num_variants"],
            seed=self.seed,
            keep_all_masked=self.keep_all_masked,
        )

    def _do_chunks(self, plan: Plan, progress: Progress) -> None:
        """Tag, then make variants, of the chunks for which that is not done."""
        from .generate import TagJob, VariantJob

        jobs: list[tuple[str, str, ShardJob[Any, int]]] = [("making variants", "variants", VariantJob(plan))]
        if plan.tagger is not None:
            jobs.insert(0, ("tagging", "tags", TagJob(plan)))
        for title, kind, job in jobs:
            missing = plan.missing(kind)
            task = progress.task(title, total=sum(plan.rows_of(chunk) for chunk in missing))
            failed = [
                f"chunk {outcome.shard}: {outcome.failure}"
                for outcome in map_shards(
                    job,
                    missing,
                    name=f"augment-{kind}-{fingerprint([plan.digest, plan.rules.config_hash.hex(), plan.seed])}",
                    workers=self.workers,
                    cluster=self.cluster,
                    on_advance=task.advance,
                )
                if outcome.failure is not None
            ]
            task.done()
            if failed:
                raise IncompleteError(
                    f"{title}: {len(failed)} of {plan.num_chunks} chunks failed",
                    details=failed[:5],
                    fix="run the same command again; finished chunks are kept",
                )


def _compared(plan: Plan, original_keys: np.ndarray) -> tuple[Counter[str], list[np.ndarray]]:
    """Counts over all chunks, and per chunk which of its variants stay."""
    import numpy as np

    from .dedup import compare
    from .generate import KEY_COLUMN, fixed_bytes, read_arrow, read_counts

    counts: Counter[str] = Counter()
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for chunk in range(plan.num_chunks):
        table = read_arrow(plan.file("variants", chunk))
        counts += read_counts(table)
        iterations = table["aug_iter"].to_numpy()
        columns.append((fixed_bytes(table[KEY_COLUMN]), fixed_bytes(table["parent_id"]), iterations))
    keys, parents, iterations = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    same, duplicate = compare(keys, parents, iterations, original_keys)
    counts["dropped_same_as_original"] = int(same.sum())
    counts["dropped_duplicate"] = int(duplicate.sum())
    ends = np.cumsum([len(keys) for keys, _, _ in columns])
    return counts, np.split(~(same | duplicate), ends[:-1])


def _figures(made: Counter[str]) -> dict[str, Any]:
    """The counts of the operators for the summary."""
    reasons = ("unchanged", "all_masked", "leak", "same_as_original", "duplicate")
    return {
        "variants_made": made["made"],
        "variants_dropped": {reason: made[f"dropped_{reason}"] for reason in reasons},
        "words_seen": made["words"],
        "words_masked": made["mask"],
        "words_replaced": made["pos"],
        "words_replaced_by_themselves": made["pos_identical"],
        "texts_changed": made["sides"],
        "windows_cut": made["ngram"],
    }


def _all_rows(originals: pa.Table, plan: Plan | None, kept: list[np.ndarray]) -> Iterator[pa.Table]:
    import pyarrow as pa

    from .generate import KEY_COLUMN, read_arrow

    yield originals
    if plan is not None:
        for chunk, keep in enumerate(kept):
            table = read_arrow(plan.file("variants", chunk)).filter(pa.array(keep))
            yield table.drop_columns(KEY_COLUMN).replace_schema_metadata(None)


def _rows_per_split(originals: pa.Table, plan: Plan | None, kept: list[np.ndarray]) -> dict[str, int]:
    import pyarrow as pa

    from .generate import read_arrow

    columns = [originals["split"]]
    if plan is not None:
        files = [plan.file("variants", chunk) for chunk in range(plan.num_chunks)]
        columns += [read_arrow(file)["split"].filter(pa.array(keep)) for file, keep in zip(files, kept, strict=True)]
    counts: Counter[str] = Counter()
    for column in columns:
        counts.update({entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()})
    return dict(counts)
