"""Series of values out of a CSV with one row a time step.

Each entity is split in time order. A validation or test sequence begins with the entity's first row, so that the
state is warm when the scored part begins; weights say which steps are scored.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import DataRecipe
from training.data import Corpus, DataError, Feature, Sequence, file_sha256, part, to_ids, warm

Row = dict[str, str]
MISSING = ("", "NA", "NaN", "nan", "null")


@dataclass(frozen=True)
class Table:
    """One entity: [N, F] float64 values in time order, NaN where missing, and a label per row if there is one."""

    name: str
    values: NDArray[np.float64]
    labels: list[str]


def csv_file(path: Path, data: DataRecipe) -> Corpus:
    """Any CSV: numeric columns are features; `time`, `series` and `label` name columns that are not."""
    rows = read_rows(path.read_bytes())
    if not rows:
        raise DataError(f"{path} has no rows under its header")
    for option, column in (("--time", data.time), ("--series", data.series), ("--label", data.label)):
        if column and column not in rows[0]:
            raise DataError(f"{option} {column}: {path} has the columns {', '.join(rows[0])}")
    if data.symbol:
        return _symbols_corpus(path, rows, data)
    columns, notes = _numeric_columns(rows, data)
    features = [Feature(column, fill="last") for column in columns]
    tables = [
        Table(
            name,
            np.array([[number(row[c]) for c in columns] for row in part]),
            [row.get(data.label, "") for row in part],
        )
        for name, part in _entities(rows, data)
    ]
    corpus = values_corpus(tables, features, list(data.targets), data, source=path.name, sha256=file_sha256(path))
    return replace(corpus, notes=corpus.notes + notes)


def _numeric_columns(rows: list[Row], data: DataRecipe) -> tuple[list[str], list[str]]:
    named = {data.time, data.series, data.label}
    numeric = [c for c in rows[0] if c not in named and all(_isnumber(row[c]) for row in rows)]
    for target in data.targets:
        if target not in numeric:
            raise DataError(f"--target {target} is no numeric column; there are {', '.join(numeric) or 'none'}")
    if not numeric:
        raise DataError("the file has no numeric column to learn from")
    if not (data.targets or data.label):
        raise DataError(f"name what to predict: --target one of {', '.join(numeric)}, or --label a column of classes")
    left = [c for c in rows[0] if c not in named and c not in numeric]
    return numeric, [f"left out columns that hold no numbers: {', '.join(left)}"] if left else []


def _entities(rows: list[Row], data: DataRecipe) -> list[tuple[str, list[Row]]]:
    """Rows by entity, in time order where `time` names a column, else in the file's."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row[data.series] if data.series else "all", []).append(row)
    if data.time:
        for part in parts.values():
            part.sort(key=lambda row: parse_time(row[data.time]))
    return list(parts.items())


def values_corpus(
    tables: list[Table], features: list[Feature], targets: list[str], data: DataRecipe, *, source: str, sha256: str
) -> Corpus:
    """Split each table in time, fit means and spreads on the training parts, fill gaps with the last value."""
    names = [feature.name for feature in features]
    chosen = [names.index(target) for target in targets]
    labels = sorted({label for table in tables for label in table.labels if label}) if not targets else []
    cuts = {table.name: _cuts(len(table.values), table.name, data) for table in tables}
    seen = np.concatenate([table.values[: cuts[table.name][0]] for table in tables])
    features = [_fitted(feature, seen[:, i]) for i, feature in enumerate(features)]
    sequences = [_sequence(table, features, chosen, labels) for table in tables]
    return Corpus(
        train=[part(sequence, 0, cuts[sequence.name][0]) for sequence in sequences],
        validation=[warm(sequence, *cuts[sequence.name]) for sequence in sequences],
        test=[warm(sequence, cuts[sequence.name][1], len(sequence)) for sequence in sequences],
        input_kind="values",
        source=source,
        sha256=sha256,
        features=features,
        targets=chosen,
        labels=labels,
        warm_up={sequence.name: cuts[sequence.name][1] for sequence in sequences},
        notes=[note for table in tables for note in _gaps(table, names)],
    )


def _cuts(rows: int, name: str, data: DataRecipe) -> tuple[int, int]:
    first, second = int(rows * (1 - data.validation - data.test)), int(rows * (1 - data.test))
    if first < 2 or second <= first or rows - 1 <= second:
        raise DataError(f"{name} has {rows} rows, too few to split: lower data.validation and data.test, or add rows")
    return first, second


def _fitted(feature: Feature, column: NDArray[np.float64]) -> Feature:
    known = column[~np.isnan(column)]
    if not len(known):
        raise DataError(f"{feature.name} has no value in the training part: leave the column out")
    spread = float(known.std())
    return replace(feature, mean=float(known.mean()), std=spread if spread > 1e-9 else 1.0)


def _sequence(table: Table, features: list[Feature], targets: list[int], labels: list[str]) -> Sequence:
    values = torch.tensor(fill_last(table.values, [feature.mean for feature in features]), dtype=torch.float32)
    if not targets:
        known = {label: i for i, label in enumerate(labels)}
        wanted = torch.tensor([known.get(label, 0) for label in table.labels])
        return Sequence(table.name, values, wanted, torch.tensor([float(bool(label)) for label in table.labels]))
    observed = torch.tensor(~np.isnan(table.values), dtype=torch.float32)
    return Sequence(table.name, values[:-1], values[1:, targets], observed[1:, targets])


def fill_last(values: NDArray[np.float64], first: list[float]) -> NDArray[np.float64]:
    """[N, F] with each gap filled by the last value before it; a gap at the start by `first`."""
    filled = values.copy()
    filled[0] = np.where(np.isnan(filled[0]), first, filled[0])
    for before, row in pairwise(filled):
        np.copyto(row, before, where=np.isnan(row))
    return filled


def _gaps(table: Table, names: list[str]) -> list[str]:
    missing = np.isnan(table.values).sum(axis=0)
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, missing, strict=True) if count)
    return [f"{table.name}: filled with the last value, of {len(table.values)} rows: {listed}"] if listed else []


def _symbols_corpus(path: Path, rows: list[Row], data: DataRecipe) -> Corpus:
    """A column of symbols in, a label per row out; the vocabulary is the whole file's."""
    if data.symbol not in rows[0] or not data.label:
        raise DataError(f"data.symbol must name one of {', '.join(rows[0])}, beside --label")
    symbols = sorted({row[data.symbol] for row in rows})
    labels = sorted({row[data.label] for row in rows})
    known, classes = ({item: i for i, item in enumerate(items)} for items in (symbols, labels))
    cuts, sequences = {}, []
    for name, entity in _entities(rows, data):
        cuts[name] = _cuts(len(entity), name, data)
        ids = to_ids([row[data.symbol] for row in entity], known)
        sequences.append(
            Sequence(name, ids, to_ids([row[data.label] for row in entity], classes), torch.ones(len(ids)))
        )
    return Corpus(
        train=[part(sequence, 0, cuts[sequence.name][0]) for sequence in sequences],
        validation=[warm(sequence, *cuts[sequence.name]) for sequence in sequences],
        test=[warm(sequence, cuts[sequence.name][1], len(sequence)) for sequence in sequences],
        input_kind="symbols",
        source=path.name,
        sha256=file_sha256(path),
        symbols=symbols,
        labels=labels,
        splitter={"kind": "words", "lowercase": False},
        warm_up={sequence.name: cuts[sequence.name][1] for sequence in sequences},
    )


def read_rows(content: bytes) -> list[Row]:
    """The rows of a CSV with a header."""
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))


def parse_time(text: str) -> datetime:
    """ISO 8601; raises DataError otherwise."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise DataError(f"{text!r} is no ISO 8601 time, as 2013-01-31T18:00") from error


def _isnumber(text: str) -> bool:
    try:
        return text in MISSING or math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def number(text: str) -> float:
    """NaN where the text says that the value is missing."""
    return math.nan if text in MISSING else float(text)
