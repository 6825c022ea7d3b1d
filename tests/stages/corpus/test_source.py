"""Where a corpus comes from: names, splits and slices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kd.pipeline.errors import UsageError
from kd.stages.corpus import DatasetSource
from kd.stages.corpus.source import SplitPart, parse_split


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("imdb", ("imdb", None)),
        ("imdb:train", ("imdb", "train")),
        ("owner/name/config:test", ("owner/name/config", "test")),
        ("data/x:train[:1000]", ("data/x", "train[:1000]")),
        ("data/x:train[10%:]", ("data/x", "train[10%:]")),
        ("data/x:train+validation[:5]", ("data/x", "train+validation[:5]")),
        ("s3://bucket/x.csv", ("s3://bucket/x.csv", None)),
        ("s3://bucket/x:dev", ("s3://bucket/x", "dev")),
        ("C:/x y", ("C:/x y", None)),
    ],
)
def test_the_split_is_what_follows_the_first_colon_that_can_start_one(
    dataset: str, expected: tuple[str, str | None]
) -> None:
    assert DatasetSource(dataset=dataset, text_column="t").located() == expected


def test_a_file_whose_name_holds_a_colon_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a:b"
    file.touch()
    assert DatasetSource(dataset=str(file), text_column="t").located() == (str(file), None)


@pytest.mark.parametrize(
    ("split", "num_rows", "expected"),
    [
        ("train", 10, (0, 10)),
        ("train[:3]", 10, (0, 3)),
        ("train[:300]", 10, (0, 10)),
        ("train[-3:]", 10, (7, 10)),
        ("train[25%:50%]", 10, (2, 5)),
        ("train[5:2]", 10, (5, 5)),
        ("train[:-1]", 0, (0, 0)),
    ],
)
def test_slices_count_as_in_python_and_percentages_as_rows(
    split: str, num_rows: int, expected: tuple[int, int]
) -> None:
    assert parse_split(split)[0].bounds(num_rows) == expected


def test_splits_can_be_joined() -> None:
    assert parse_split("a+b[1:]") == [SplitPart("a"), SplitPart("b", "1")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": ""}, "--dataset is empty"),
        ({"text_column": ""}, "--text-column is empty"),
        ({"task": "singlelabel"}, "did you mean 'single-label'"),
        ({"task": "token", "text_pair_column": "u"}, "a token task has one text per row"),
        ({"text_pair_column": "t"}, "--text-column and --text-pair-column are both 't'"),
        ({"label_column": "t"}, "is also a text column"),
    ],
)
def test_nonsense_is_refused_before_anything_is_read(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DatasetSource(**{"dataset": "x", "text_column": "t", **fields})


@pytest.mark.parametrize("split", ["train[1]", "train[a:b]"])
def test_a_slice_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        parse_split(split)


def test_naming_a_source_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kd.stages.corpus import DatasetSource; from kd.stages.augment import Augment; "
        "DatasetSource(dataset='x', text_column='t'); "
        "print(sorted({'pyarrow', 'numpy', 'datasets', 'torch', 'dask', 'regex'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
