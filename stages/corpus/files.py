"""Reading raw columns: files, dataset folders and hub datasets to one Arrow table per split."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq
import yaml

from ...pipeline.errors import RefusedError, near_match
from .source import SplitPart, parse_split

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
"""File types read, by ending."""
SPLIT_SYNONYMS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev", "development"),
    ("test", "testing", "eval", "evaluation"),
)
"""Names under which a split is also looked for."""

_SAVE_AGAIN = "save it again: dataset.save_to_disk(folder)"

Chooser = Callable[[Sequence[str]], Sequence[str]]
"""From the columns a file has to those that are to be read; raises when one is missing."""


@dataclass(frozen=True)
class RawTable:
    """Columns as the source holds them.

    Attributes:
        table: the chosen columns.
        split_names: the split of each row, as runs `(name, rows)`.
        class_names: names of the classes of a column, where the source declares them (`ClassLabel`).
        tag: short name of the source, without the machine's folders.
    """

    table: pa.Table
    split_names: list[tuple[str, int]]
    class_names: dict[str, tuple[str, ...]]
    tag: str


@dataclass
class _Part:
    table: pa.Table
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_raw(dataset: str, split: str | None, choose: Chooser, *, split_default: str = "train") -> RawTable:
    """Read the chosen columns of a dataset.

    Args:
        dataset: file, dataset folder or hub id.
        split: split expression, None for the one there is or `split_default`.
        choose: picks the columns to read from those there are.

    Raises:
        RefusedError: no such file, folder, dataset, split or column, or a file that cannot be read as its type.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        parts = _parts_of_file(path, split)
    elif path.is_dir():
        parts = parse_split(split or _only_split(path) or split_default)
    else:
        _refuse_missing_path(dataset)
        parts = parse_split(split or split_default)

    tables: list[pa.Table] = []
    runs: list[tuple[str, int]] = []
    class_names: dict[str, tuple[str, ...]] = {}
    for part in parts:
        if path.is_file():
            raw = _read_file(path, choose)
        elif path.is_dir():
            raw = _read_folder(path, part.name, choose)
        else:
            raw = _read_with_datasets(dataset, part.name, choose)
        start, stop = part.bounds(raw.table.num_rows)
        tables.append(raw.table.slice(start, stop - start))
        runs.append((part.name, stop - start))
        class_names.update(raw.class_names)
    return RawTable(_concatenate(tables, dataset), runs, class_names, path.name if path.exists() else dataset)


def evaluation_splits(dataset: str, split: str | None) -> list[str]:
    """The validation and test splits beside a split, as `D:split` or files: what training text must not repeat.

    Of a folder or hub id its splits, of a file such as `train.csv` the files beside it; without those in use; none
    where nothing else is in use.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        own, names = path.stem, [*_splits_on_disk(path.parent)] if _canonical(path.stem) else []
        found = [(name, str(file)) for name in names for file in _splits_on_disk(path.parent)[name]]
    elif path.is_dir():
        own = split or _only_split(path) or "train"
        found = [(name, f"{dataset}:{name}") for name in _splits_on_disk(path)]
    else:
        own = split or "train"
        found = [(name, f"{dataset}:{name}") for name in _splits_on_hub(dataset)]
    used = [part.name for part in parse_split(own)]
    if all(map(_is_evaluation, used)):
        return []
    known = {_canonical(name) or name for name in used}
    return sorted(p for name, p in found if _is_evaluation(name) and (_canonical(name) or name) not in known)


def _is_evaluation(name: str) -> bool:
    """Whether a split is for evaluation, by its name: `validation`, `dev`, `test_matched`."""
    return _canonical(re.split(r"[-_.]", name)[0]) in ("validation", "test")


# Where things are ------------------------------------------------------------------------------------------------


def _refuse_missing_path(dataset: str) -> None:
    """Refuse what can only be a path; leave what may be a hub id."""
    if "://" in dataset:
        raise RefusedError(
            f"dataset {dataset} is a URL, and only local files, local folders and hub ids are read",
            fix="download it first",
        )
    path = Path(dataset).expanduser()
    looks_like_path = (
        dataset.startswith((".", "/", "~"))
        or path.suffix.lower() in SUFFIXES
        or dataset.count("/") > 2
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", dataset)
    )
    # A first folder that exists is a local path with a slip in it rather than the owner of a hub dataset.
    parent = path.parent
    if looks_like_path or (str(parent) != "." and parent.is_dir()):
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        hint = near_match(path.name, siblings) if siblings else ""
        hint = hint if "did you mean" in hint else ""
        missing = "does not exist" if parent.is_dir() else f"does not exist, nor does the folder {parent}"
        raise RefusedError(
            f"dataset {dataset} {missing}{hint}",
            fix="give a csv, tsv, jsonl, json, parquet or arrow file, a dataset folder, or a hub id",
        )


def _parts_of_file(path: Path, split: str | None) -> list[SplitPart]:
    own = _canonical(path.stem)
    if split is None:
        return [SplitPart(own or "train")]
    parts = parse_split(split)
    for part in parts:
        if part.name != "train" and part.name != path.stem and _canonical(part.name) != own:
            raise RefusedError(
                f"{path} is one file and has no split {part.name!r}",
                fix=f"leave the split out, or give the folder: {path.parent}:{part.name}",
            )
    return parts


def _canonical(name: str) -> str | None:
    return next((names[0] for names in SPLIT_SYNONYMS if name.lower() in names), None)


def _splits_on_disk(folder: Path) -> dict[str, list[Path]]:
    """Split name to files: `<split>.ext`, `<split>-00000-of-00002.ext`, `<split>/...`, in the folder or `data/`."""
    if (folder / "dataset_dict.json").is_file():
        names = _saved(folder / "dataset_dict.json", "splits", str)
        return {name: _saved_files(folder / name) for name in names}
    if (folder / "state.json").is_file():
        return {"train": _saved_files(folder)}
    found: dict[str, list[Path]] = {}
    for root in (folder, folder / "data"):
        if not root.is_dir():
            continue
        for entry in sorted(root.iterdir()):
            if entry.name.startswith((".", "_")):
                continue
            if entry.is_file() and entry.suffix.lower() in SUFFIXES:
                match = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?", entry.stem)
                found.setdefault(match[1] if match else entry.stem, []).append(entry)
            elif entry.is_dir() and _canonical(entry.name):
                files = [file for file in sorted(entry.rglob("*")) if file.suffix.lower() in SUFFIXES]
                if files:
                    found.setdefault(entry.name, []).extend(files)
        if found:
            break
    return found


def _saved_files(folder: Path) -> list[Path]:
    named = _saved(folder / "state.json", "_data_files", lambda file: str(file["filename"]))
    files = [folder / name for name in named]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RefusedError(f"{folder} lacks files that its state.json names", details=missing[:5], fix=_SAVE_AGAIN)
    return files


def _saved(file: Path, key: str, read: Callable[[Any], str]) -> list[str]:
    """A list in a file that `save_to_disk` wrote."""
    try:
        return [read(item) for item in json.loads(file.read_text(encoding="utf-8"))[key]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(
            f"{file} does not describe a saved dataset: {type(error).__name__}: {_first_line(error)}", fix=_SAVE_AGAIN
        ) from None


def _only_split(folder: Path) -> str | None:
    splits = [*_splits_on_disk(folder)]
    return splits[0] if len(splits) == 1 else None


# Reading ---------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, split: str, choose: Chooser) -> _Part:
    splits = _splits_on_disk(folder)
    names = [split] if split in splits else [n for n in splits if _canonical(n) and _canonical(n) == _canonical(split)]
    if not splits:
        return _read_with_datasets(str(folder), split, choose)
    if len(names) != 1:
        known = ", ".join(f"{name}" for name in splits)
        raise RefusedError(
            f"dataset {folder} has no split {split!r}" + near_match(split, splits)
            if not names
            else f"dataset {folder}: split {split!r} may be {' or '.join(names)}",
            details=[f"splits: {known}"],
            fix=f"give {folder}:<split>",
        )
    files = splits[names[0]]
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise RefusedError(
            f"split {names[0]!r} of {folder} is there in several formats",
            details=[file.name for file in files],
            fix="give the file itself",
        )
    parts = [_read_file(file, choose) for file in files]
    class_names = _classes_in_card(folder) | _classes_in_dataset_info(folder, folder / names[0])
    for part in parts:
        class_names.update(part.class_names)
    return _Part(_concatenate([part.table for part in parts], str(folder)), class_names)


def _concatenate(tables: list[pa.Table], where: str) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    try:
        return pa.concat_tables([table.unify_dictionaries() for table in tables], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise RefusedError(f"the files of {where} hold a column in types that do not go together: {error}") from None


def _read_file(path: Path, choose: Chooser) -> _Part:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RefusedError(f"dataset file {path} is not of a known type", details=[f"known: {', '.join(SUFFIXES)}"])
    if path.stat().st_size == 0:
        raise RefusedError(f"dataset file {path} is empty")
    readers = {
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
        ".jsonl": _read_json,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
    }
    return readers[suffix](path, choose)


def _read_parquet(path: Path, choose: Chooser) -> _Part:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            table = file.read(columns=[*choose(schema.names)])
    except (pa.ArrowInvalid, OSError) as error:
        raise RefusedError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None
    return _Part(_valid(table, path), _classes_in_schema(schema))


def _read_arrow(path: Path, choose: Chooser) -> _Part:
    try:
        source = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise RefusedError(f"{path} cannot be read as Arrow: {_first_line(error)}") from None
    return _Part(_valid(table.select([*choose(table.schema.names)]), path), _classes_in_schema(table.schema))


def _valid(table: pa.Table, path: Path) -> pa.Table:
    """The table, if what it says is text is UTF-8."""
    for name in table.schema.names:
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid as error:
            raise RefusedError(f"column {name!r} of {path} is not valid: {_first_line(error)}") from None
    return table


def _read_json(path: Path, choose: Chooser) -> _Part:
    """JSON lines, or one JSON list of objects. Keys that a row lacks are null."""
    text = _decoded(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise RefusedError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
            raise RefusedError(f"{path} cannot be read: {_first_line(error)}") from None
        numbered = list(enumerate(rows, start=1))
        place = "item"
    else:
        place = "line"
        numbered = []
        # Only line feeds end a line of JSON: U+2028 may stand inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise RefusedError(
                    f"{path}, line {number}: not JSON: {error.msg} (column {error.colno})",
                    fix="write one JSON object per line",
                ) from None
            except (ValueError, RecursionError) as error:
                raise RefusedError(f"{path}, line {number}: cannot be read: {_first_line(error)}") from None
    names: dict[str, None] = {}
    for number, row in numbered:
        if not isinstance(row, dict):
            raise RefusedError(f"{path}, {place} {number}: expected an object, found {_shown(row)}")
        names.update(dict.fromkeys(row))
    chosen = choose(list(names))
    columns = {}
    for name in chosen:
        values = [row.get(name) for _, row in numbered]
        try:
            columns[name] = pa.array(values)
        except UnicodeEncodeError as error:
            raise RefusedError(f"column {name!r} of {path} holds text that is not Unicode: {error.reason}") from None
        except OverflowError:
            raise RefusedError(f"column {name!r} of {path} holds numbers of more than 64 bits") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            kinds: dict[str, int] = {}
            for (number, _), value in zip(numbered, values, strict=True):
                kinds.setdefault(_kind(value), number)
            found = ", ".join(f"{kind} ({place} {number})" for kind, number in kinds.items() if kind != "NoneType")
            raise RefusedError(f"column {name!r} of {path} holds values of different types: {found}") from None
    return _Part(pa.table(columns))


def _read_csv(path: Path, choose: Chooser) -> _Part:
    return _read_separated(path, choose, separator=",", quoted=True)


def _read_tsv(path: Path, choose: Chooser) -> _Part:
    """Tab-separated text. Quotes are part of the text, unless every field that holds one is a quoted field.

    So the files of GLUE, which quote nothing, keep their quotes; files that pandas or `csv` wrote lose theirs.
    """
    text = _decoded(path)
    fields = [f for f in re.split(r"[\t\r\n]", text) if '"' in f] if '"' in text else []
    quoted = bool(fields) and all(re.fullmatch(r'"(?:[^"]|"")*"', f) for f in fields)
    return _read_separated(path, choose, separator="\t", quoted=quoted)


def _read_separated(path: Path, choose: Chooser, *, separator: str, quoted: bool) -> _Part:
    text = _decoded(path)
    lines = io.StringIO(text, newline="")
    try:
        header = next(csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))
    except (csv.Error, StopIteration) as error:
        raise RefusedError(f"the first line of {path} is not a header: {_first_line(error)}") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    try:
        chosen = list(choose(header))
    except RefusedError:
        other = next((mark for mark in (";", "\t", "|") if mark in header[0]), None)
        if len(header) > 1 or other is None:
            raise
        raise RefusedError(
            f"{path} seems to be separated by {other!r}, not by {separator!r}",
            details=[f"header: {_shown(header[0])}"],
            fix="save it with commas, or as .tsv with tabs",
        ) from None
    if any(name in twice for name in chosen):
        raise RefusedError(f"{path} has several columns named {twice[0]!r}", details=[f"header: {', '.join(header)}"])
    ragged: list[str] = []

    def note(row: pa.csv.InvalidRow) -> str:
        ragged.append(f"row {row.number}: {row.actual_columns} columns: {_shown(row.text)}")
        return "skip"

    try:
        table = pa.csv.read_csv(
            io.BytesIO(text.encode()),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=1 << 24),
            parse_options=pa.csv.ParseOptions(
                delimiter=separator,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=note,
            ),
            # Everything as text: "NA", "null" and "007" are texts; numbers are worked out per column below.
            convert_options=pa.csv.ConvertOptions(
                include_columns=chosen, column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise RefusedError(f"{path} cannot be read: {_first_line(error)}") from None
    if ragged:
        raise RefusedError(
            f"{len(ragged)} rows of {path} do not have the {len(header)} columns of its header",
            details=[*ragged[:3], f"header: {', '.join(header)}"],
            fix="quote values that hold the separator" if quoted else "remove tabs from the values",
        )
    return _Part(table)


def _decoded(path: Path) -> str:
    """The text of a file that must be UTF-8; a byte order mark is dropped."""
    data = path.read_bytes()
    for mark, name in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if data.startswith(mark):
            raise RefusedError(
                f"{path} is {name}, not UTF-8", fix=f"iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        around = data[max(0, error.start - 20) : error.start + 20].decode("utf-8", errors="replace")
        raise RefusedError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8",
            details=[f"near: {around!r}"],
            fix=f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}   (or whatever encoding it is in)",
        ) from None


# datasets --------------------------------------------------------------------------------------------------------


def _read_with_datasets(dataset: str, split: str, choose: Chooser) -> _Part:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name, configuration = _name_and_configuration(dataset)
    try:
        loaded = datasets.load_dataset(name, configuration, split=split)
    except DatasetNotFoundError:
        raise RefusedError(f"dataset {dataset!r} is neither a local path nor on the hub") from None
    except (ConnectionError, OSError) as error:
        raise RefusedError(
            f"dataset {dataset!r} is not a local path, and the hub cannot be reached: {_first_line(error)}",
            fix="unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or give a local file or folder"
            if "Offline" in str(error)
            else "give a local file or folder, or go online",
        ) from None
    except ValueError as error:
        raise RefusedError(f"dataset {dataset!r} cannot be loaded: {_first_line(error)}") from None
    chosen = list(choose(loaded.column_names))
    classes = _classes_in_features(loaded.features.to_dict())
    return _Part(loaded.select_columns(chosen).with_format("arrow")[:], classes)


def _splits_on_hub(dataset: str) -> list[str]:
    import datasets

    name, configuration = _name_and_configuration(dataset)
    try:
        return list(datasets.get_dataset_split_names(name, configuration))
    except (ConnectionError, OSError, ValueError):
        # The usual names: what is not there or not within reach is reported when it is to be read.
        return ["test", "validation"]


def _name_and_configuration(dataset: str) -> tuple[str, str | None]:
    owner, _, configuration = dataset.rpartition("/")
    return (owner, configuration) if dataset.count("/") == 2 and not Path(dataset).exists() else (dataset, None)


_NO_DECLARATION = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What comes of reading a declaration of classes in something that is none."""


def _classes_in_schema(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        return _classes_in_features(json.loads(raw).get("info", {}).get("features", {})) if raw else {}
    except _NO_DECLARATION:
        return {}


def _classes_in_dataset_info(*folders: Path) -> dict[str, tuple[str, ...]]:
    for folder in folders:
        file = folder / "dataset_info.json"
        if file.is_file():
            try:
                return _classes_in_features(json.loads(file.read_text(encoding="utf-8")).get("features") or {})
            except _NO_DECLARATION as error:
                raise RefusedError(f"{file} does not describe a dataset: {_first_line(error)}") from None
    return {}


def _classes_in_card(folder: Path) -> dict[str, tuple[str, ...]]:
    """Class names that the `dataset_info` of a README.md declares, as `datasets` writes it for the hub."""
    try:
        return _read_card(folder)
    except _NO_DECLARATION:
        return {}


def _read_card(folder: Path) -> dict[str, tuple[str, ...]]:
    card = folder / "README.md"
    if not card.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        info = (yaml.safe_load(match[1]) or {}).get("dataset_info") if match else None
    except yaml.YAMLError:
        return {}
    # Several configurations: their folders are datasets of their own, and this one is none of them.
    info = info[0] if isinstance(info, list) and len(info) == 1 else info
    features = info.get("features") if isinstance(info, dict) else None
    found = {}
    for feature in features if isinstance(features, list) else []:
        kinds = [feature.get(key) for key in ("dtype", "sequence", "list")]
        names = next((k["class_label"]["names"] for k in kinds if isinstance(k, dict) and "class_label" in k), None)
        if names:
            found[str(feature["name"])] = tuple(str(names[key]) for key in sorted(names, key=int))
    return found


def _classes_in_features(features: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, feature in features.items():
        while isinstance(feature, (dict, list)) and not (isinstance(feature, dict) and "names" in feature):
            feature = feature[0] if isinstance(feature, list) and feature else _inner(feature)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature["names"]:
            found[name] = tuple(feature["names"])
    return found


def _inner(feature: Any) -> Any:
    return feature.get("feature") if isinstance(feature, dict) else None


# Words for messages ----------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    """The type of a value; of a list with what it holds."""
    if not isinstance(value, list):
        return type(value).__name__
    return f"list of {' and '.join(dict.fromkeys(type(item).__name__ for item in value))}" if value else "empty list"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _shown(value: Any, limit: int = 80) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
