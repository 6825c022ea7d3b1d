"""`kd augment`: a dataset becomes a corpus, with variants of its texts for the teacher to label."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import IncompleteError, KdError, RefusedError, UsageError, near_match
from ...pipeline.executor import ShardJob, check_execution, cluster_option, map_shards, workers_option
from ...pipeline.fingerprint import fingerprint
from ...pipeline.stage import Progress, Stage, StageContext, StageResult, option
from ..corpus import DatasetSource
from ..corpus.source import TASKS
from .operators import (
    DEFAULTS,
    FAULTS,
    FOLDERS,
    GENERATORS,
    LISTED,
    MODEL_KINDS,
    OPERATORS,
    PAIRED,
    PRESETS,
    PROBABILITIES,
    TAGGED,
    WORD_OPERATORS,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ..corpus import Corpus, CorpusInfo
    from .generate import Plan
    from .generated import Generation
    from .pools import Pools
    from .report import Report
    from .rules import Rules

WORK_FOLDER = "work"
VARIANTS_PER_CHUNK = 1 << 15
GENERATED_PER_CHUNK = 256
"""Of variants that a model writes: they take long, and what is not finished when a run is killed is written again."""
_SOURCE = "Source"
_LABELS = "Labels"
_OPERATORS = "Operators"
_LEAKAGE = "Test data"
_EXECUTION = "Execution"


@dataclass(frozen=True, kw_only=True)
class Augment(Stage):
    """Import a dataset and add variants of its texts: masked words, other words, short windows.

    Originals come first and keep their labels; variants carry none, since the teacher labels them. The corpus is the
    same, byte for byte, whatever the order of the rows, the number of workers and the interruptions.
    """

    command: ClassVar[str] = "augment"
    kind: ClassVar[str | None] = "corpus"
    on_interrupt: ClassVar[str] = "finished chunks are kept; the same command goes on from there"

    dataset: str = option(help="Dataset D[:split]: a file, a dataset folder or a hub id.", panel=_SOURCE)
    text_column: str = option(
        help="Column of the text, of the first text of a pair, or of lists of words.", panel=_SOURCE
    )
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.", panel=_SOURCE)
    label_column: str | None = option(
        None, help="Column of the gold label; of lists of tags beside lists of words.", panel=_SOURCE
    )
    task: str | None = option(
        None,
        help="What the label is, where its column does not say.",
        panel=_SOURCE,
        choices=TASKS,
    )
    transfer_dataset: tuple[str, ...] = option((), help="Further text D[:split], joined without labels.", panel=_SOURCE)
    transfer_text_column: str | None = option(
        None, help="Its text column; --text-column when not given.", panel=_SOURCE
    )
    transfer_text_pair_column: str | None = option(
        None, help="Its second text column; --text-pair-column when not given.", panel=_SOURCE
    )

    transfer_lines: bool = option(False, help="Every line of a further text is a text of its own.", panel=_SOURCE)
    transfer_ratio: float | None = option(
        None, help="Further texts per row of the dataset, sampled; all when not given.", panel=_SOURCE
    )
    transfer_seed: int = option(0, help="Which texts are sampled.", panel=_SOURCE)

    labels_per_class: int | None = option(None, help="Keep so many labels per class, hide the others.", panel=_LABELS)
    labels_total: int | None = option(None, help="Keep so many labels in all, hide the others.", panel=_LABELS)
    label_seed: int = option(0, help="Which labels are kept.", panel=_LABELS)

    operators: tuple[str, ...] = option(
        (),
        help="mask, pos, synonym, neighbour, mlm, delete, swap, ngram; for pairs exchange, recombine; for entities "
        "mention; back-translate, lm. mask,pos,ngram or what the preset says; none only imports.",
        panel=_OPERATORS,
    )
    num_variants: int | None = option(
        None, help="Variants tried per original; 3, or what the preset says.", panel=_OPERATORS
    )
    preset: str | None = option(
        None, help="Published settings for what is not given.", panel=_OPERATORS, choices=tuple(PRESETS)
    )
    mask_probability: float | None = option(
        None, help="mask: a word becomes the mask token with this probability; 0.1.", panel=_OPERATORS
    )
    pos_probability: float | None = option(
        None, help="pos: a word becomes another of its part of speech; 0.1.", panel=_OPERATORS
    )
    synonym_probability: float | None = option(
        None, help="synonym: a word becomes a synonym of --wordnet; 0.1.", panel=_OPERATORS
    )
    neighbour_probability: float | None = option(
        None, help="neighbour: a word becomes one near to it in --word-table; 0.1.", panel=_OPERATORS
    )
    mlm_probability: float | None = option(
        None, help="mlm: a word becomes what --masked-lm would say in its place; 0.4.", panel=_OPERATORS
    )
    delete_probability: float | None = option(None, help="delete: a word is left out; 0.1.", panel=_OPERATORS)
    swap_probability: float | None = option(
        None, help="swap: a word trades places with another; 0.1.", panel=_OPERATORS
    )
    ngram_probability: float | None = option(
        None, help="ngram: only a window of 1 to 5 words is kept; 0.25.", panel=_OPERATORS
    )
    exchange_probability: float | None = option(
        None,
        help="exchange: the two texts of a pair trade places, for tasks in which their order says nothing; 0.5.",
        panel=_OPERATORS,
    )
    recombine_probability: float | None = option(
        None,
        help="recombine: a text of a pair becomes that of another row, for tasks in which their order says nothing; "
        "0.1.",
        panel=_OPERATORS,
    )
    mention_probability: float | None = option(
        None, help="mention: a named entity becomes another of its type; 0.5.", panel=_OPERATORS
    )
    wordnet: str | None = option(None, help="synonym: folder of the files of WordNet 3.", panel=_OPERATORS)
    word_table: str | None = option(
        None,
        help="neighbour: checkpoint whose word table is taken, such as the teacher, or minilm.",
        panel=_OPERATORS,
        metavar="PATH|ID",
    )
    masked_lm: str | None = option(
        None, help="mlm: checkpoint of a masked language model.", panel=_OPERATORS, metavar="PATH|ID"
    )
    translation_model: str | None = option(
        None,
        help="back-translate: translation model from the text's language into another.",
        panel=_OPERATORS,
        metavar="PATH|ID",
    )
    back_translation_model: str | None = option(
        None, help="back-translate: translation model of the way back.", panel=_OPERATORS, metavar="PATH|ID"
    )
    translation_prefix: str = option(
        "", help="back-translate: what --translation-model wants before a text.", panel=_OPERATORS
    )
    back_translation_prefix: str = option(
        "", help="back-translate: what --back-translation-model wants before a text.", panel=_OPERATORS
    )
    language_model: str | None = option(
        None, help="lm: language model that goes on from a text's first words.", panel=_OPERATORS, metavar="PATH|ID"
    )
    pair_separator: str = option(
        " <sep> ", help="lm: what stood between the texts of a pair when the model was trained.", panel=_OPERATORS
    )
    num_generated: int = option(
        1, help="back-translate, lm: variants of each original, beside --num-variants of the others.", panel=_OPERATORS
    )
    sampling_temperature: float = option(
        1.0, help="back-translate after its first variant, lm: temperature of sampling.", panel=_OPERATORS
    )
    sampling_top_k: int = option(
        40, help="back-translate, lm: tokens that are sampled from; 0 for all.", panel=_OPERATORS
    )
    num_candidates: int | None = option(
        None, help="neighbour, mlm: words that a word is replaced from; 15.", panel=_OPERATORS
    )
    mask_token: str = option("[MASK]", help="The teacher's mask token.", panel=_OPERATORS, choices=("[MASK]", "<mask>"))
    keep_all_masked: bool = option(False, help="Keep variants in which every word is masked.", panel=_OPERATORS)
    keep_edits: bool = option(
        False, help="Keep in a column aug_edits which words of its original a variant was changed at.", panel=_OPERATORS
    )
    pair_sides: str | None = option(
        None,
        help="Text of a pair that a variant changes: first, second, both in turn (cycle), first and second in turn "
        "(alternate), or any of the three by chance (random).",
        panel=_OPERATORS,
        choices=("cycle", "alternate", "random"),
    )
    tagger: str = option(
        "auto",
        help="Part-of-speech tagger of pos and synonym; auto takes HanTa where it is installed.",
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
        values = {**DEFAULTS, **(PRESETS[self.preset] if self.preset else {})}
        chosen = self._chosen(values.pop("operators"))
        single, pairs = values.pop("num_variants")
        values["num_variants"] = single if self.text_pair_column is None else pairs
        given = {name: getattr(self, name) for name in ("num_variants", "pair_sides", "num_candidates")}
        values.update({name: value for name, value in given.items() if value is not None})
        for name in OPERATORS:
            probability = getattr(self, f"{name}_probability")
            if name not in chosen and probability:
                raise UsageError(
                    f"--{name}-probability {probability} is given, and operator {name!r} is not among --operators",
                    fix=f"add {name} to --operators, or leave the probability out",
                )
            values[name] = 0.0 if name not in chosen else PROBABILITIES[name] if probability is None else probability
            if not 0.0 <= values[name] <= 1.0:
                raise UsageError(f"--{name}-probability is {values[name]}; expected a number from 0 to 1")
        if sum(values[name] for name in WORD_OPERATORS) > 1.0 + 1e-9:
            used = [f"{name} {values[name]}" for name in WORD_OPERATORS if values[name]]
            raise UsageError(
                f"the probabilities of {', '.join(used)} sum to more than 1",
                details=["one operator at most acts on a word"],
                fix="give lower ones (--mask-probability 0.05, ...)",
            )
        if not 0 <= values["num_variants"] < 1 << 15:
            raise UsageError(f"--num-variants is {values['num_variants']}; expected a number from 0 to 32767")
        if not any(values[name] for name in OPERATORS):
            values["num_variants"] = 0
        if any(name in chosen for name in GENERATORS):
            values |= self._generation_settings(chosen)
            total = values["num_variants"] + sum(values.get(name, 0) for name in GENERATORS)
            if total >= 1 << 15:
                raise UsageError(f"{total} variants of each original are asked for; at most 32767 can be numbered")
        if values["num_candidates"] < 1:
            raise UsageError(f"--num-candidates is {values['num_candidates']}; expected 1 or more")
        if self.transfer_lines and not (self.transfer_dataset and self.text_pair_column is None):
            raise UsageError(
                "--transfer-lines needs single texts and --transfer-dataset",
                fix="leave it out, or give the texts whose lines are meant as --transfer-dataset",
            )
        if self.transfer_ratio is not None and not (self.transfer_dataset and 0 <= self.transfer_ratio < float("inf")):
            raise UsageError(
                f"--transfer-ratio is {self.transfer_ratio}; expected 0 or more, and --transfer-dataset",
                fix="give the texts to sample from as --transfer-dataset",
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed} does not fit into 64 bits")
        return values

    def _chosen(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The operators that act; their files are there if they need any."""
        names = self.operators or default
        for name in names:
            if name not in (*OPERATORS, *GENERATORS, "none"):
                names_known = (*OPERATORS, *GENERATORS, "none")
                raise UsageError(f"operator {name!r} does not exist{near_match(name, names_known)}")
        if "none" in names:
            if len(names) > 1:
                raise UsageError(f"operators {','.join(names)}: 'none' stands alone")
            return ()
        for name in PAIRED:
            if name in names and self.text_pair_column is None:
                raise UsageError(f"operator {name!r} needs pairs of texts", fix="give --text-pair-column")
        for option_name, name in FOLDERS.items():
            flag = f"--{option_name.replace('_', '-')}"
            folder = getattr(self, option_name)
            if name in names and folder is None:
                raise UsageError(f"operator {name!r} needs {flag}", fix=f"give {flag} FOLDER")
            if name not in names and folder is not None:
                raise UsageError(
                    f"{flag} is given, and operator {name!r} is not among --operators", fix=f"add {name} to --operators"
                )
        return names

    def _generation_settings(self, chosen: tuple[str, ...]) -> dict[str, Any]:
        """The settings of the operators that have a model write."""
        if not any(name in chosen for name in OPERATORS) and self.num_variants is not None:
            raise UsageError(
                f"--num-variants counts variants of rules, and --operators are {','.join(chosen)}",
                fix=f"give --num-generated {self.num_variants}",
            )
        if self.num_generated < 0:
            raise UsageError(f"--num-generated is {self.num_generated}; expected 0 or more")
        if not 0 < self.sampling_temperature < float("inf"):
            raise UsageError(f"--sampling-temperature is {self.sampling_temperature}; expected a number above 0")
        if "lm" in chosen and not self.pair_separator.strip():
            raise UsageError("--pair-separator is empty; expected characters that stand between the texts of a pair")
        if self.sampling_top_k < 0:
            raise UsageError(f"--sampling-top-k is {self.sampling_top_k}; expected 0 or more")
        names = ("sampling_temperature", "sampling_top_k")
        generated = {name: self.num_generated for name in GENERATORS if name in chosen}
        return {**generated, **{name: getattr(self, name) for name in names}}

    def _uses(self, name: str) -> bool:
        """Whether an operator acts."""
        if name in GENERATORS:
            return bool(self.resolved.get(name, 0) > 0)
        return bool(self.resolved["num_variants"] > 0 and self.resolved[name] > 0)

    @property
    def _makes_variants(self) -> bool:
        return self.resolved["num_variants"] > 0 or any(map(self._uses, GENERATORS))

    @cached_property
    def tagger_identity(self) -> dict[str, str] | None:
        """Name, version and model of the tagger; None when no operator needs one."""
        from .tagger import tagger_identity

        return tagger_identity(self.tagger, self.language) if any(map(self._uses, TAGGED)) else None

    def identity_config(self) -> dict[str, Any]:
        """The fields that change the result, presets resolved; what an unused operator is set to does not count."""
        config = super().identity_config()
        resolved = self.resolved
        unused = ["preset", "operators", "tagger", "language", *FOLDERS]
        config.update({name: resolved[name] for name in ("num_variants", "pair_sides", "num_candidates")})
        for name in OPERATORS:
            config[f"{name}_probability"] = resolved[name]
            if not self._uses(name):
                unused.append(f"{name}_probability")
        if resolved["drop_all_changed"] and self.text_pair_column is None:
            config["drop_all_changed"] = True
        if not resolved["num_variants"]:
            unused += ["keep_all_masked", "drop_all_changed"]
        if not self.keep_edits:  # corpora are older than the option
            unused.append("keep_edits")
        if not self._makes_variants:
            unused += ["seed", "keep_edits"]
        if not self._uses("back-translate"):
            unused += ["translation_prefix", "back_translation_prefix"]
        if not self._uses("lm") or self.text_pair_column is None:
            unused.append("pair_separator")
        if not any(map(self._uses, GENERATORS)):
            unused += ["num_generated", "sampling_temperature", "sampling_top_k"]
        if not self._uses("mask"):
            unused += ["mask_token", "keep_all_masked"]
        if not (resolved["num_variants"] or self._uses("back-translate")) or self.text_pair_column is None:
            unused.append("pair_sides")
        if not any(map(self._uses, LISTED)):
            unused.append("num_candidates")
        if not self.transfer_dataset:
            unused += ["transfer_text_column", "transfer_text_pair_column", "transfer_ratio"]
        if not self.transfer_lines:  # corpora are older than the option
            unused.append("transfer_lines")
        if not self.transfer_dataset or self.transfer_ratio is None:
            unused.append("transfer_seed")
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

        corpus = load_corpus(self._source)
        writes = next(filter(self._uses, GENERATORS), None)
        if corpus.info.task == "token" and writes is not None:
            raise RefusedError(
                f"operator {writes!r} writes other words than those of {self.dataset}, which have a tag each",
                fix=f"leave {writes} out of --operators",
            )
        if self._uses("mention"):
            _require_bio(corpus, self.dataset)
        return hide_labels(
            corpus,
            labels_per_class=self.labels_per_class,
            labels_total=self.labels_total,
            label_seed=self.label_seed,
        )

    @cached_property
    def _originals(self) -> Corpus:
        """The rows of the dataset and the transfer text."""
        from ..corpus.corpus import join_unlabelled, load_corpus
        from .dedup import text_keys
        from .words import splitter

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
        most = None if self.transfer_ratio is None else round(self.transfer_ratio * len(self._labelled))
        return join_unlabelled(
            self._labelled,
            transfer,
            keys_of=partial(text_keys, split=splitter(self._labelled.info.task)),
            forbidden=self._excluded[0],
            most=most,
            seed=self.transfer_seed,
            lines=self.transfer_lines,
        )

    @cached_property
    def _excluded(self) -> tuple[set[bytes], list[dict[str, Any]]]:
        """Keys of the texts that must not appear, and where they come from."""
        from ..corpus.corpus import load_corpus
        from ..corpus.files import evaluation_splits
        from .dedup import forbidden_keys
        from .words import splitter

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
            keys |= forbidden_keys(*corpus.texts(), splitter(corpus.info.task))
        return keys, records

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the rows, of the texts to avoid and of the tagger; reads and checks all of them."""
        check_execution(self.workers, self.cluster)
        tagger = self.tagger_identity
        self._check_models()
        found = {"dataset": self._labelled.fingerprint}
        if self.transfer_dataset:
            found["transfer_dataset"] = self._originals.fingerprint
        keys, _ = self._excluded
        found["exclude_dataset"] = blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest()
        if self._makes_variants:
            from .draws import AUG_VERSION
            from .words import WORDS_VERSION

            found["aug_version"] = f"{AUG_VERSION}, words {WORDS_VERSION}"
        if tagger is not None:
            found["tagger"] = fingerprint(tagger)
        return found | self.folder_digests | self._model_digests

    @cached_property
    def _folders(self) -> dict[str, str]:
        """The local folders that operators need, by option name."""
        from ..packaged import checkpoint_source
        from .checkpoint import checkpoint_folder

        found = {name: getattr(self, name) for name, operator in FOLDERS.items() if self._uses(operator)}
        for name in found.keys() - {"wordnet"}:
            source = checkpoint_source(found[name], option=f"--{name.replace('_', '-')}")
            found[name] = str(checkpoint_folder(source))
        return found

    @cached_property
    def folder_digests(self) -> dict[str, str]:
        """Hashes of the files that operators read words from, by option name."""
        return self._digests_of([name for name in FOLDERS if name not in MODEL_KINDS])

    @cached_property
    def _model_digests(self) -> dict[str, str]:
        """Hashes of the models that write, by option name."""
        return self._digests_of(MODEL_KINDS)

    def _digests_of(self, option_names: Iterable[str]) -> dict[str, str]:
        from .checkpoint import checkpoint_digest
        from .synonym import wordnet_digest

        digests = {}
        for option_name in option_names:
            if self._uses(FOLDERS[option_name]):
                digest = wordnet_digest if option_name == "wordnet" else checkpoint_digest
                digests[option_name] = digest(self._folders[option_name])
        return digests

    def _check_models(self) -> None:
        """Refuse models that cannot write what they are for."""
        for option_name, kind in MODEL_KINDS.items():
            if self._uses(FOLDERS[option_name]):
                from .generator import check_generator

                check_generator(self._folders[option_name], kind)

    # Work --------------------------------------------------------------------------------------------------------

    def run(self, context: StageContext) -> StageResult:
        """Write the corpus: originals in the order of their ids, then variants in the order of their originals."""
        import numpy as np
        import pyarrow as pa

        from ...pipeline.artifact import atomic_write_bytes
        from ..corpus.corpus import sorted_by_id, write_tables
        from .draws import AUG_VERSION
        from .generate import (
            FORBIDDEN,
            ORIGINALS,
            VariantJob,
            mentions_of,
            pools_of,
            read_arrow,
            texts_of,
            with_keys,
            write_arrow,
        )
        from .generated import GenerateJob, given_rows, model_record, write_given
        from .recombine import texts_digest
        from .report import REPORT, Report
        from .words import WORDS_VERSION

        self._say_what_is_not_checked(context.progress)
        forbidden, excluded = self._excluded
        info = self._originals.info
        originals, keys = with_keys(sorted_by_id(self._originals.table), info.task)
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
        if not (work / ORIGINALS).exists():
            write_arrow(originals.filter(pa.array(~leaks)), work / ORIGINALS)
        originals = read_arrow(work / ORIGINALS)

        plan = None
        if self._makes_variants:
            digest = fingerprint([self.inputs(), self.resolved["num_candidates"]])
            generations = self._generations
            plan = self.plan(work.resolve(), len(originals), info=info, digest=digest, generations=generations)
        made: Counter[str] = Counter()
        kept: list[np.ndarray] = []
        if plan is not None:
            atomic_write_bytes(work / FORBIDDEN, b"".join(sorted(forbidden)))
            if plan.num_variants:
                self.prepare(plan, context.progress)
                self._map(plan, "making variants", "variants", VariantJob(plan), context.progress)
            for generation in plan.generations:
                title = f"asking the models of {generation.operator}"
                self._map(plan, title, generation.operator, GenerateJob(plan, generation), context.progress)
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
            summary |= _figures(made, plan)
        report = Report()
        content = write_tables(
            _all_rows(originals, plan, kept, report),
            folder,
            info=info,
            num_rows=_rows_per_split(originals, plan, kept),
            counts=summary,
        )
        content["excluded"] = excluded
        if plan is not None:
            names = (*OPERATORS, *GENERATORS)
            summary["rows_by_operator"] = {name: report.rows[name] for name in names if report.rows[name]}
            (folder / REPORT).write_text(report.text(summary), encoding="utf-8")
            content["augmentation"] = {
                "aug_version": AUG_VERSION,
                "words_version": WORDS_VERSION,
                "config_hash": plan.rules.config_hash.hex(),
                "settings": {**self.resolved, "mask_token": self.rules.mask_token},
                "seed": self.seed,
                "tagger": self.tagger_identity,
                **({"pools": _pools_record(pools_of(plan))} if plan.num_variants else {}),
                **({"files": self.folder_digests} if self.folder_digests else {}),
            }
            if self.keep_edits:
                content["augmentation"]["edit_operators"] = [*OPERATORS]
            if (mentions := mentions_of(plan)) is not None:
                content["augmentation"]["mentions"] = {
                    "digest": mentions.pools.digest,
                    "types": len(np.unique(mentions.pools.tags)),
                    "mentions": len(mentions.pools.words),
                    "expected_identical_rate": round(mentions.pools.identical_rate(), 6),
                }
            if texts := texts_of(plan):
                sizes = [len(side.texts) for side in texts]
                content["augmentation"]["recombine"] = {"digest": texts_digest(texts), "texts": sizes}
            if plan.generations:
                content["augmentation"]["generated"] = model_record(plan, made)
                write_given(given_rows(plan, kept), folder)
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

    def plan(
        self, work: Path, num_rows: int, *, info: CorpusInfo, digest: str, generations: tuple[Generation, ...] = ()
    ) -> Plan:
        """What to generate.

        Args:
            work: the working folder.
            num_rows: originals.
            info: of the corpus.
            digest: of all that decides over the files in the folder.
            generations: what models write besides.
        """
        from .generate import Plan

        return Plan(
            folder=work,
            digest=digest,
            num_rows=num_rows,
            rows_per_chunk=self._rows_per_chunk,
            info=info,
            tagger=self.tagger_identity["name"] if self.tagger_identity else None,
            language=self.language,
            rules=self.rules,
            num_variants=self.resolved["num_variants"],
            seed=self.seed,
            keep_all_masked=self.keep_all_masked,
            keep_all_changed=not self.resolved["drop_all_changed"],
            keep_edits=self.keep_edits,
            generations=generations,
        )

    @property
    def _rows_per_chunk(self) -> int:
        """Originals per chunk."""
        sizes = [VARIANTS_PER_CHUNK // self.resolved["num_variants"]] if self.resolved["num_variants"] else []
        sizes += [GENERATED_PER_CHUNK // self.resolved[name] for name in GENERATORS if self._uses(name)]
        return max(1, int(min(sizes)))

    @property
    def _generations(self) -> tuple[Generation, ...]:
        """What models write, one entry per operator."""
        from .generated import Generation

        is_pair = self.text_pair_column is not None
        settings: dict[str, dict[str, Any]] = {
            "back-translate": {
                "prefixes": (self.translation_prefix, self.back_translation_prefix),
                "pair_sides": self.resolved["pair_sides"] if is_pair else "",
            },
            "lm": {"separator": self.pair_separator if is_pair else ""},
        }
        found, first = [], self.resolved["num_variants"]
        for name in filter(self._uses, GENERATORS):
            options = [option_name for option_name in MODEL_KINDS if FOLDERS[option_name] == name]
            found.append(
                Generation(
                    operator=name,
                    models=tuple((self._folders[o], self._model_digests[o]) for o in options),
                    num_variants=self.resolved[name],
                    first=first,
                    temperature=self.sampling_temperature,
                    top_k=self.sampling_top_k,
                    **settings[name],
                )
            )
            first += self.resolved[name]
        return tuple(found)

    @property
    def rules(self) -> Rules:
        """What the operators do; what none of them uses is as it is by default, so that it changes no draw."""
        from .rules import Rules

        settings: dict[str, Any] = {name: self.resolved[name] for name in OPERATORS}
        if self.resolved["mask"]:
            settings["mask_token"] = self.mask_token
        if self.text_pair_column is not None:
            settings["pair_sides"] = self.resolved["pair_sides"]
        return Rules(**settings)

    def prepare(self, plan: Plan, progress: Progress, chunks: Collection[int] | None = None) -> None:
        """Split into words and look for candidates, where that is not done.

        Args:
            plan: what to generate; its folder has the originals.
            progress: where to report.
            chunks: that variants will be made of; all when not given.
        """
        from .generate import WordsJob

        self._map(plan, "splitting into words", "words", WordsJob(plan), progress)
        self._list_candidates(plan, progress, chunks)

    def _map(
        self,
        plan: Plan,
        title: str,
        kind: str,
        job: ShardJob[Any, int],
        progress: Progress,
        chunks: Collection[int] | None = None,
    ) -> None:
        """Do a job with every chunk, or these, that lacks a file of this kind."""
        missing = [chunk for chunk in plan.missing(kind) if chunks is None or chunk in chunks]
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

    def _list_candidates(self, plan: Plan, progress: Progress, chunks: Collection[int] | None) -> None:
        """Write the candidates of the words, for the operators that replace words by such."""
        from .candidates import as_column
        from .generate import ORIGINALS, PIECES, RECOMBINE, pools_of, read_arrow, write_arrow
        from .recombine import text_tables

        makers = {"synonym": self._synonyms, "neighbour": self._neighbours, "mlm": self._neighbours_of_pieces}
        for name, make in makers.items():
            file = plan.folder / (PIECES if name == "mlm" else f"{name}.arrow")
            if self._uses(name) and not file.exists():
                pools = pools_of(plan)
                progress.info(f"{name}: looking up {len(pools.words)} words")
                write_arrow(as_column(make(plan, pools)), file)
        if self._uses("recombine") and not (plan.folder / RECOMBINE).exists():
            write_arrow(text_tables(read_arrow(plan.folder / ORIGINALS)), plan.folder / RECOMBINE)
        if self._uses("mlm"):
            from .mlm import MlmJob

            job = MlmJob(plan, self._folders["masked_lm"], self.resolved["num_candidates"])
            self._map(plan, "asking the masked LM", "mlm", job, progress, chunks)

    def _synonyms(self, plan: Plan, pools: Pools) -> list[list[str]]:
        from .synonym import synonym_lists
        from .tagger import load_tagger

        assert plan.tagger is not None
        names = load_tagger(plan.tagger, plan.language).names
        return synonym_lists(pools.words, [names[tag] for tag in pools.tags.tolist()], self._folders["wordnet"])

    def _neighbours(self, plan: Plan, pools: Pools) -> list[list[str]]:
        from .checkpoint import load_word_table
        from .neighbour import neighbour_lists

        table = load_word_table(self._folders["word_table"])
        return neighbour_lists(pools.words, *table, self.resolved["num_candidates"])

    def _neighbours_of_pieces(self, plan: Plan, pools: Pools) -> list[list[str]]:
        """Of the words that the masked LM has in several pieces."""
        from .checkpoint import load_word_table
        from .neighbour import neighbour_lists

        table_VH, tokenizer = load_word_table(self._folders["masked_lm"])
        return neighbour_lists(pools.words, table_VH, tokenizer, self.resolved["num_candidates"], least_pieces=2)


def _require_bio(corpus: Corpus, dataset: str) -> None:
    """Refuse rows that `mention` can do nothing with."""
    from ..entities import BioTags

    bio = BioTags.of(corpus.info.label_names) if corpus.info.task == "token" else None
    if bio is None or (bio.begin < 0).any():
        names = corpus.info.label_names
        raise RefusedError(
            f"operator 'mention' needs words with BIO tags, and {dataset} has none",
            details=[
                f"task: {corpus.info.task!r}",
                f"labels: {', '.join(names[:8]) or '(none)'}{', ...' if len(names) > 8 else ''}",
                "expected: O, and B-X and I-X for every type X",
            ],
            fix="leave mention out of --operators, or give --label-column the column of such tags",
        )


def _compared(plan: Plan, original_keys: np.ndarray) -> tuple[Counter[str], list[np.ndarray]]:
    """Counts over all chunks, and per chunk which of its variants stay."""
    import numpy as np

    from .dedup import compare
    from .generate import KEY_COLUMN, fixed_bytes, read_arrow, read_counts

    counts: Counter[str] = Counter()
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for _, file in plan.files_of_variants():
        table = read_arrow(file)
        counts += read_counts(table)
        iterations = table["aug_iter"].to_numpy()
        columns.append((fixed_bytes(table[KEY_COLUMN]), fixed_bytes(table["parent_id"]), iterations))
    keys, parents, iterations = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    same, duplicate = compare(keys, parents, iterations, original_keys)
    counts["dropped_same_as_original"] = int(same.sum())
    counts["dropped_duplicate"] = int(duplicate.sum())
    ends = np.cumsum([len(keys) for keys, _, _ in columns])
    return counts, np.split(~(same | duplicate), ends[:-1])


def _figures(made: Counter[str], plan: Plan) -> dict[str, Any]:
    """The counts of the operators for the summary."""
    reasons = ["unchanged", "empty", "all_masked", "all_changed", "leak", "same_as_original", "duplicate"]
    words = {name: {"words": made[name], "stayed": made[f"{name}_identical"]} for name in WORD_OPERATORS if made[name]}
    texts = {name: {"texts": made[name]} for name in ("ngram", *PAIRED, *GENERATORS) if made[name]}
    for generation in plan.generations:
        reasons += [f"{generation.operator}_{fault}" for fault in FAULTS[generation.operator]]
    if made["mention"]:
        texts["mention"] = {"mentions": made["mention"], "stayed": made["mention_identical"]}
    return {
        "variants_made": made["made"],
        "variants_dropped": {reason: made[f"dropped_{reason}"] for reason in reasons},
        "words_seen": made["words"],
        "texts_seen": made["sides"],
        "changes": {**words, **texts},
    }


def _pools_record(pools: Pools) -> dict[str, Any]:
    import numpy as np

    return {
        "digest": pools.digest,
        "tags": len(np.unique(pools.tags)),
        "words": len(pools.words),
        "tags_with_one_word": int((np.unique(pools.tags, return_counts=True)[1] == 1).sum()),
        "expected_identical_rate": round(pools.identical_rate(), 6),
    }


def _all_rows(originals: pa.Table, plan: Plan | None, kept: list[np.ndarray], report: Report) -> Iterator[pa.Table]:
    """The rows of the corpus as they are written; shows the variants to the report."""
    import pyarrow as pa

    from ..corpus.schema import EDITS_FIELD
    from .generate import read_arrow

    if plan is not None and plan.keep_edits:
        originals = originals.append_column(EDITS_FIELD, pa.nulls(len(originals), EDITS_FIELD.type))
    yield originals
    if plan is not None:
        for (chunk, file), keep in zip(plan.files_of_variants(), kept, strict=True):
            table = read_arrow(file).filter(pa.array(keep))
            report.see(table, plan.originals(chunk))
            yield table.select(originals.column_names).replace_schema_metadata(None)


def _rows_per_split(originals: pa.Table, plan: Plan | None, kept: list[np.ndarray]) -> dict[str, int]:
    import pyarrow as pa

    from .generate import read_arrow

    columns = [originals["split"]]
    if plan is not None:
        files = [file for _, file in plan.files_of_variants()]
        columns += [read_arrow(file)["split"].filter(pa.array(keep)) for file, keep in zip(files, kept, strict=True)]
    counts: Counter[str] = Counter()
    for column in columns:
        counts.update({entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()})
    return dict(counts)
