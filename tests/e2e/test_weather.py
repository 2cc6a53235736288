"""The shipped forecaster, streamed hour by hour through the service, errs as its evaluation says."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from live import ROOT, Server

from training.config import recipe_from
from training.corpora import load_corpus
from training.evaluate import Row, test_rows

MODEL = "nyc-weather"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    newest = max((ROOT / "models" / MODEL).iterdir(), key=lambda path: int(path.name))
    return dict(json.loads((newest / "manifest.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def shipping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(ROOT / "models", tmp_path_factory.mktemp("weather"))
    yield one.start()
    one.close()


def streamed_error(server: Server, airport: str, rows: list[Row]) -> float:
    """Mean absolute error of the median temperature: the months before are fed at once, the test months one by one."""
    path = f"/v1/sessions/{airport}/steps"
    before = [row.values for row in rows if not row.scored]
    server.ok(server.post(path, {"model": MODEL, "inputs": before, "predictions": "none"}))
    errors = []
    for row in rows[len(before) :]:
        answer = server.ok(server.post(path, {"inputs": [row.values], "position": row.position}))
        median = answer["predictions"][0]["quantiles"]["0.5"]["temperature"]
        errors.append(abs(median - row.expected[0]))
    known = [error for error in errors if not math.isnan(error)]
    return sum(known) / len(known)


@pytest.mark.slow
def test_streaming_the_test_months_gives_the_error_that_evaluate_printed(
    manifest: dict[str, Any], shipping: Server
) -> None:
    recipe = recipe_from(manifest["training"]["recipe"])
    corpus = load_corpus(recipe, Path(ROOT / ".cache"))
    by_airport = {name: list(rows) for name, rows in groupby(test_rows(corpus), key=lambda row: row.series)}
    printed = manifest["metrics"]["by_entity"]
    with ThreadPoolExecutor(len(by_airport)) as pool:
        found = pool.map(lambda item: streamed_error(shipping, *item), by_airport.items())
        for airport, error in zip(by_airport, found, strict=True):
            assert error == pytest.approx(printed[airport]["temperature"]["model"], abs=1e-4), airport


def test_it_beats_persistence_and_ridge(manifest: dict[str, Any]) -> None:
    figures = [airport["temperature"] for airport in manifest["metrics"]["by_entity"].values()]
    assert len(figures) == 3
    assert all(figure["model"] <= 0.9 * figure["persistence"] for figure in figures)
    assert sum(figure["model"] < figure["AR(48) ridge"] for figure in figures) >= 2
