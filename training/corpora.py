"""Finds the corpus that a recipe names."""

from __future__ import annotations

from pathlib import Path

from training import data_text, series, weather, who
from training.config import Recipe
from training.data import Corpus, DataError

SOURCES = ("shakespeare", "nyc-weather", "who", "file")


def load_corpus(recipe: Recipe, cache: Path) -> Corpus:
    """The recipe's three parts; archives are kept in `cache`."""
    data = recipe.data
    if data.source == "shakespeare":
        return data_text.shakespeare(cache)
    if data.source == "nyc-weather":
        return weather.nyc_weather(cache, data, only=data.only)
    if data.source == "who":
        return who.corpus(data.stories)
    if data.source == "file":
        return _file(recipe)
    raise DataError(f"data.source is {data.source!r}; it must be one of {', '.join(SOURCES)}")


def _file(recipe: Recipe) -> Corpus:
    path = Path(recipe.data.path)
    if not path.is_file():
        raise DataError(f"data.path: there is no file {recipe.data.path!r}; give one with --data")
    if recipe.task == "language-model":
        return data_text.text_file(path, recipe.data.validation, recipe.data.test)
    return series.csv_file(path, recipe.data)
