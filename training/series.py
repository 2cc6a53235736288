"""Series of values out of a CSV or Parquet file with one row a time step.

Each entity is split in time order. A validation or test sequence begins with the entity's first row, so that the
state is warm when the scored part begins; weights say which steps are scored.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import DataRecipe, unknown_key
from training.data import Corpus, DataError, Feature, Sequence, file_sha256, part, to_ids, warm

Row = dict[str, str]
MISSING = ("", "NA", "NaN", "nan", "null")
HELD_BYTES = 2**30
"""rows are held in memory"""
BLOCKS = 4
"""held out of a training series for calibration"""
SHUFFLE = 7
"""seed of the order in which whole series are dealt to the parts"""


@dataclass(frozen=True)
class Table:
    """One entity: [N, F] float64 values in time order, NaN where missing, and a label per row if there is one.

    `said` [N, K] is what is to be said of each row where it is not among the values.
    """

    name: str
    values: NDArray[np.float64]
    labels: list[str]
    said: NDArray[np.float64] | None = None


SAID_HERE = ("regressor", "multi-label")
"""tasks whose answer is of the row itself, by values that it is not given"""


def csv_file(path: Path, data: DataRecipe, task: str = "forecaster") -> Corpus:
    """Any CSV: numeric columns are features; `time`, `series` and `label` name columns that are not.

    What a regressor or a multi-label model is to say is no feature; what a forecaster predicts is one.
    """
    rows = read_file(path)
    if not rows:
        raise DataError(f"{path} has no rows under its header: give at least some hundred steps")
    for option, column in (("--time", data.time), ("--series", data.series), ("--label", data.label)):
        if column and column not in rows[0]:
            near = unknown_key(column, list(rows[0])).partition("; ")[2]
            raise DataError(f"{option} {column}: {path} has the columns {', '.join(rows[0])}; {near}")
    return rows_corpus(rows, data, task, source=path.name, sha256=file_sha256(path))


def rows_corpus(rows: list[Row], data: DataRecipe, task: str, *, source: str, sha256: str) -> Corpus:
    """Rows of named columns as a corpus."""
    if data.symbol:
        return _symbols_corpus(rows, data, task, source=source, sha256=sha256)
    columns, notes = _numeric_columns(rows, data)
    if task in SAID_HERE:
        columns = [column for column in columns if column not in data.targets]
    features = [Feature(column, fill="last") for column in columns]
    entities, more = _entities(rows, data)
    tables = [
        Table(
            name,
            np.array([[number(row[c]) for c in columns] for row in part]),
            [row.get(data.label, "") for row in part],
            np.array([[number(row[c]) for c in data.targets] for row in part]) if task in SAID_HERE else None,
        )
        for name, part in entities
    ]
    targets = list(data.targets)
    corpus = values_corpus(tables, features, targets, data, source=source, sha256=sha256, task=task)
    return replace(corpus, notes=corpus.notes + notes + more)


def _numeric_columns(rows: list[Row], data: DataRecipe) -> tuple[list[str], list[str]]:
    named = {data.time, data.series, data.label}
    numeric = [c for c in rows[0] if c not in named and all(_isnumber(row[c]) for row in rows)]
    for target in data.targets:
        if target not in numeric:
            odd = next(
                (
                    f"; row {i + 2} holds {row[target]!r}"
                    for i, row in enumerate(rows)
                    if target in row and not _isnumber(row[target])
                ),
                "",
            )
            raise DataError(f"--target {target} is no numeric column; there are {', '.join(numeric) or 'none'}{odd}")
    if not numeric:
        raise DataError("the file has no numeric column to learn from")
    if not (data.targets or data.label):
        raise DataError(f"name what to predict: --target one of {', '.join(numeric)}, or --label a column of classes")
    left = [c for c in rows[0] if c not in named and c not in numeric]
    return numeric, [f"left out columns that hold no numbers: {', '.join(left)}"] if left else []


def _entities(rows: list[Row], data: DataRecipe) -> tuple[list[tuple[str, list[Row]]], list[str]]:
    """Rows by entity, in time order where `time` names a column, else in the file's; and what had to be mended."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row[data.series] if data.series else "all", []).append(row)
    notes = []
    if data.time:
        for name, part in parts.items():
            times = [parse_time(row[data.time]) for row in part]
            order = sorted(range(len(part)), key=times.__getitem__)
            if order != list(range(len(part))):
                notes.append(f"{name}: the rows were not in the order of {data.time} and were sorted")
            twice = next((times[a] for a, b in pairwise(order) if times[a] == times[b]), None)
            if twice is not None:
                hint = "leave one out" if data.series else "name the column of entities with --series, or leave one out"
                raise DataError(f"{name} has two rows at {data.time} {twice.isoformat()}: {hint}")
            parts[name] = [part[i] for i in order]
    return list(parts.items()), notes


def values_corpus(
    tables: list[Table],
    features: list[Feature],
    targets: list[str],
    data: DataRecipe,
    *,
    source: str,
    sha256: str,
    task: str = "forecaster",
) -> Corpus:
    """Split the tables, fit means and spreads on the training parts, fill gaps with the last value."""
    names = [feature.name for feature in features]
    own = [Feature(target) for target in targets] if task in SAID_HERE else []
    chosen = list(range(len(own))) if own else [names.index(target) for target in targets]
    labels = targets if task == "multi-label" else []
    if not targets:
        labels = sorted({label for table in tables for label in table.labels if label})
    dealt = dealt_series([table.name for table in tables], data) if data.split == "series" else None
    lengths = {table.name: len(table.values) for table in tables}
    cuts = {} if dealt else {name: _cuts(rows, name, data) for name, rows in lengths.items()}
    learnt = [table for table in tables if dealt is None or dealt[table.name] == 0]
    seen = np.concatenate([table.values[: cuts.get(table.name, (None,))[0]] for table in learnt])
    features = [_fitted(feature, seen[:, i]) for i, feature in enumerate(features)]
    if own:
        told = np.concatenate([_said(table)[: cuts.get(table.name, (None,))[0]] for table in learnt])
        own = [_fitted(feature, told[:, i]) for i, feature in enumerate(own)]
    sequences = [_sequence(table, features, chosen, labels, data.horizons, task) for table in tables]
    if dealt is not None:
        parts = [[sequence for sequence in sequences if dealt[sequence.name] == i] for i in range(3)]
    else:
        parts = [
            [_unseen_beyond(part(sequence, 0, cuts[sequence.name][0]), data.horizons) for sequence in sequences],
            [_unseen_beyond(warm(sequence, *cuts[sequence.name]), data.horizons) for sequence in sequences],
            [warm(sequence, cuts[sequence.name][1], len(sequence)) for sequence in sequences],
        ]
    wanted = (data.calibration or data.fold) and dealt is None
    kept = [held_out(sequence, data) for sequence in parts[0]] if wanted else []
    return Corpus(
        train=[rest for rest, _ in kept] or parts[0],
        validation=parts[1],
        test=parts[2],
        calibration=[block for _, block in kept],
        input_kind="values",
        source=source,
        sha256=sha256,
        features=features,
        targets=chosen if task != "multi-label" else [],
        horizons=data.horizons,
        outputs=own if task == "regressor" else [],
        labels=labels,
        whole=dealt is not None,
        warm_up={sequence.name: 0 if dealt else cuts[sequence.name][1] for sequence in sequences},
        notes=[note for table in tables for note in _gaps(table, names)] if dealt is None else [],
    )


def held_out(sequence: Sequence, data: DataRecipe) -> tuple[Sequence, Sequence]:
    """A training sequence without some blocks, and with nothing but them; both are fed whole.

    Steps whose target lies in a block are not learnt from either.
    """
    steps = len(sequence)
    inside = torch.zeros(steps, dtype=torch.bool)
    for block in blocks(steps, data):
        inside[block] = True
    learnt, kept = sequence.weights.clone(), sequence.weights.clone()
    width = sequence.weights.shape[1] // len(data.horizons)
    for j, horizon in enumerate(data.horizons):
        target_inside = torch.zeros_like(inside)
        target_inside[: max(0, steps - horizon)] = inside[horizon:]
        columns = slice(j * width, (j + 1) * width)
        learnt[inside | target_inside, columns] = 0
        kept[~(inside & target_inside), columns] = 0
    return replace(sequence, weights=learnt), replace(sequence, weights=kept)


def blocks(steps: int, data: DataRecipe) -> list[slice]:
    """Which steps are held out: `fold` of `folds`, a season that is not learnt at all, or BLOCKS spread over them."""
    if data.fold:
        return [slice(steps * (data.fold - 1) // data.folds, steps * data.fold // data.folds)]
    each = int(steps * data.calibration / BLOCKS)
    starts = [int((block + 0.5) * steps / BLOCKS) - each // 2 for block in range(BLOCKS)]
    return [slice(start, start + each) for start in starts]


def dealt_series(names: list[str], data: DataRecipe) -> dict[str, int]:
    """Which part each whole series goes to: 0 train, 1 validation, 2 test; by chance, the same chance every time."""
    order = np.random.default_rng(SHUFFLE).permutation(len(names))
    first, second = int(len(names) * (1 - data.validation - data.test)), int(len(names) * (1 - data.test))
    if first < 1 or second <= first or len(names) <= second:
        raise DataError(
            f"{len(names)} series are too few to deal to three parts: name their column with --series, raise "
            "data.validation and data.test, or cut them in time with --set data.split=time"
        )
    return {names[i]: int(place >= first) + int(place >= second) for place, i in enumerate(order.tolist())}


def _unseen_beyond(sequence: Sequence, horizons: tuple[int, ...]) -> Sequence:
    """The same without the targets that lie in the part behind it."""
    if horizons == (1,):
        return sequence
    weights, each = sequence.weights.clone(), sequence.weights.shape[1] // len(horizons)
    for j, horizon in enumerate(horizons):
        weights[max(0, len(weights) - horizon + 1) :, j * each : (j + 1) * each] = 0
    return replace(sequence, weights=weights)


def _said(table: Table) -> NDArray[np.float64]:
    assert table.said is not None
    return table.said


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


def _sequence(
    table: Table,
    features: list[Feature],
    targets: list[int],
    labels: list[str],
    horizons: tuple[int, ...],
    task: str,
) -> Sequence:
    values = torch.tensor(fill_last(table.values, [feature.mean for feature in features]), dtype=torch.float32)
    if table.said is not None:
        said, held = np.nan_to_num(table.said), (~np.isnan(table.said)).astype(np.float32)
        if task == "multi-label":
            if not np.isin(said, (0, 1)).all():
                raise DataError(f"{table.name}: a multi-label target holds something else than 0 and 1")
            held = held.min(axis=1)
        return Sequence(table.name, values, torch.tensor(said, dtype=torch.float32), torch.tensor(held))
    if not targets:
        known = {label: i for i, label in enumerate(labels)}
        wanted = torch.tensor([known.get(label, 0) for label in table.labels])
        return Sequence(table.name, values, wanted, torch.tensor([float(bool(label)) for label in table.labels]))
    observed = torch.tensor(~np.isnan(table.values), dtype=torch.float32)
    ahead = [(_moved(values[:, targets], h), _moved(observed[:, targets], h)) for h in horizons]
    wanted, weights = (torch.cat(columns, dim=1) for columns in zip(*ahead, strict=True))
    return Sequence(table.name, values[:-1], wanted, weights, observed[1:, targets] > 0)


def _moved(values: torch.Tensor, horizon: int) -> torch.Tensor:
    """[N, K] -> [N - 1, K]: at each row what the row `horizon` behind it holds, 0 where there is none."""
    behind = values[horizon:]
    return torch.cat((behind, values.new_zeros((len(values) - 1 - len(behind), values.shape[1]))))


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


def _symbols_corpus(rows: list[Row], data: DataRecipe, task: str, *, source: str, sha256: str) -> Corpus:
    """A column of symbols in, a label or values per row out; the vocabulary is the whole file's."""
    if data.symbol not in rows[0] or not (data.label or (data.targets and task == "regressor")):
        raise DataError(
            f"data.symbol must name one of {', '.join(rows[0])}, beside --label, or --target of a regressor"
        )
    symbols = sorted({row[data.symbol] for row in rows})
    labels = sorted({row[data.label] for row in rows}) if task != "regressor" else []
    known, classes = ({item: i for i, item in enumerate(items)} for items in (symbols, labels))
    cuts, sequences, learnt = {}, [], []
    if task == "regressor":
        _numeric_columns(rows, data)
    entities, notes = _entities(rows, data)
    for name, entity in entities:
        cuts[name] = _cuts(len(entity), name, data)
        ids = to_ids([row[data.symbol] for row in entity], known)
        if task == "regressor":
            said = np.array([[number(row[c]) for c in data.targets] for row in entity])
            learnt.append(said[: cuts[name][0]])
            weights = torch.tensor(~np.isnan(said), dtype=torch.float32)
            sequences.append(Sequence(name, ids, torch.tensor(np.nan_to_num(said), dtype=torch.float32), weights))
            continue
        sequences.append(
            Sequence(name, ids, to_ids([row[data.label] for row in entity], classes), torch.ones(len(ids)))
        )
    told = np.concatenate(learnt) if learnt else np.empty((0, 0))
    outputs = [_fitted(Feature(target), told[:, i]) for i, target in enumerate(data.targets if learnt else ())]
    return Corpus(
        train=[part(sequence, 0, cuts[sequence.name][0]) for sequence in sequences],
        validation=[warm(sequence, *cuts[sequence.name]) for sequence in sequences],
        test=[warm(sequence, cuts[sequence.name][1], len(sequence)) for sequence in sequences],
        input_kind="symbols",
        source=source,
        sha256=sha256,
        symbols=symbols,
        targets=list(range(len(outputs))),
        outputs=outputs,
        labels=labels,
        notes=notes,
        splitter={"kind": "words", "lowercase": False},
        warm_up={sequence.name: cuts[sequence.name][1] for sequence in sequences},
    )


def read_file(path: Path) -> list[Row]:
    """The rows of a CSV or Parquet file; raises DataError where it is none, or too big to hold."""
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path} is empty: give a CSV with a header and a row a step")
    if size > HELD_BYTES:
        raise DataError(f"{path} has {size / 2**30:.1f} GiB, too much to hold: give a part, or fewer columns or rows")
    return _parquet_rows(path) if path.suffix == ".parquet" else read_rows(path.read_bytes(), str(path))


def read_rows(content: bytes, name: str = "the file") -> list[Row]:
    """The rows of a CSV with a header."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")), strict=True)
        rows = list(reader)
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it first") from error
    except csv.Error as error:
        raise DataError(f"{name} is no CSV: {error}") from error
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            wide = len(reader.fieldnames or ())
            raise DataError(f"{name}: row {i + 2} has not the {wide} columns of the header: mend or remove it")
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise DataError("Parquet needs the package pyarrow: pip install pyarrow, or give a CSV") from error
    try:
        records = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {str(error)[:200]}") from error
    return [{name: _text(value) for name, value in record.items()} for record in records]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else value.isoformat() if isinstance(value, datetime) else str(value)


def parse_time(text: str) -> datetime:
    """ISO 8601, in UTC where it names no zone; raises DataError otherwise."""
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
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
