"""Finds the corpus that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import data_text, events, labelled, puzzles, series, sounds, translation, weather, who
from training.config import Recipe
from training.data import Corpus, DataError

OWN = ("file", "pairs", "sounds", "jsb", "earthquakes")
"""sources that read the file or folder `data.path`"""
FETCHED = ("shakespeare", "bible", "nyc-weather", "japanese-vowels", "digits", "stocks")
MADE = ("who", "reverse", "numbers", "adding", "copy-memory")
SOURCES = (*FETCHED, *MADE, *OWN)


def load_corpus(recipe: Recipe, cache: Path, earlier: Mapping[str, Any] | None = None) -> Corpus:
    """The recipe's three parts; archives are kept in `cache`.

    `earlier` is the meta of a run whose vocabulary text is to be read with.
    """
    data = recipe.data
    if data.source in OWN:
        return _own(recipe, earlier)
    match data.source:
        case "shakespeare":
            return data_text.shakespeare(cache, data_text.Coding.of(data, earlier))
        case "bible":
            return data_text.bible(cache, data_text.Coding.of(data, earlier))
        case "nyc-weather":
            return weather.nyc_weather(cache, data, only=data.only)
        case "who":
            return who.corpus(data.sequences)
        case "japanese-vowels":
            return labelled.japanese_vowels(cache, data)
        case "digits":
            return labelled.digits(cache, data)
        case "reverse":
            return translation.reversals(data.sequences, data)
        case "numbers":
            return translation.numbers(data)
        case "adding":
            return puzzles.adding(data)
        case "copy-memory":
            return puzzles.copy_memory(data)
        case "stocks":
            return events.stocks(cache, data)
    raise DataError(f"data.source is {data.source!r}; it must be one of {', '.join(SOURCES)}")


def _own(recipe: Recipe, earlier: Mapping[str, Any] | None) -> Corpus:
    data, path = recipe.data, Path(recipe.data.path)
    if data.source == "sounds" and data.path and path.is_dir():
        return sounds.folder(path, data)
    if data.source == "sounds":
        raise DataError(f"data.path: there is no folder {data.path!r}; give one of WAV files with --data")
    if not path.is_file():
        raise DataError(f"data.path: there is no file {data.path!r}; give one with --data")
    if data.source == "pairs":
        return translation.pairs_file(path, data)
    if data.source == "jsb":
        return labelled.chorales(path, data.transpose)
    if data.source == "earthquakes":
        return events.earthquakes(path, data)
    if recipe.task == "language-model":
        return data_text.text_file(path, data.validation, data.test, data_text.Coding.of(data, earlier))
    return series.csv_file(path, data, recipe.task)
