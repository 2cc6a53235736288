"""Two lessons in what can not be foretold: closing prices, and the next earthquake."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.config import DataRecipe
from training.data import Corpus, DataError, Feature, fetch_wheel, file_sha256, read_member
from training.series import Row, Table, number, parse_time, read_file, read_rows, rows_corpus, values_corpus

BOKEH = (
    "bokeh-sampledata",
    "2026.1",
    "py3-none-any",
    "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f",
)
QUAKE = [
    Feature("magnitude"),
    Feature("log_gap", "log10 s"),
    Feature("depth", "km"),
    Feature("latitude", "deg"),
    Feature("longitude", "deg"),
]


def stocks(cache: Path, data: DataRecipe) -> Corpus:
    """Daily prices and volumes of AAPL, FB, GOOG, IBM and MSFT, 2000 to 2013; the next day's close is asked for."""
    content = gzip.decompress(read_member(fetch_wheel(*BOKEH, cache), "stocks.csv.gz"))
    said = replace(data, time="Date", series="Ticker", targets=("Close",))
    return rows_corpus(
        read_rows(content), said, "forecaster", source="stocks in PyPI bokeh-sampledata==2026.1", sha256=BOKEH[3]
    )


def earthquakes(path: Path, data: DataRecipe) -> Corpus:
    """A catalogue of the USGS, GeoJSON or CSV: after each quake, the magnitude and delay of the next one."""
    quakes = sorted(_geojson(path) if path.suffix in (".json", ".geojson") else _csv(read_file(path), path))
    if len(quakes) < 2:
        raise DataError(f"{path} holds {len(quakes)} earthquakes: some hundred are needed")
    times = np.array([quake[0] for quake in quakes])
    gaps = np.log10(np.maximum(np.diff(times, prepend=times[0]), 1.0))
    values = np.array([[size, gap, *rest] for gap, (_, size, *rest) in zip(gaps, quakes, strict=True)])
    table = Table("world", values, [])
    features = [replace(feature, fill="last") for feature in QUAKE]
    return values_corpus([table], features, ["magnitude", "log_gap"], data, source=path.name, sha256=file_sha256(path))


def _geojson(path: Path) -> list[tuple[float, ...]]:
    """(seconds, magnitude, depth, latitude, longitude) of each event."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["features"]
        return [_event(event["properties"], event["geometry"]["coordinates"]) for event in events]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is no GeoJSON of the USGS, with properties.mag and .time and coordinates") from error


def _event(said: dict[str, float], place: list[float]) -> tuple[float, ...]:
    longitude, latitude, depth = (math.nan if value is None else float(value) for value in place)
    return said["time"] / 1000, math.nan if said["mag"] is None else float(said["mag"]), depth, latitude, longitude


def _csv(rows: list[Row], path: Path) -> list[tuple[float, ...]]:
    needed = ("time", "mag", "depth", "latitude", "longitude")
    missing = [name for name in needed if rows and name not in rows[0]]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)} of a USGS catalogue")
    try:
        return [(parse_time(row["time"]).timestamp(), *(number(row[name]) for name in needed[1:])) for row in rows]
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
