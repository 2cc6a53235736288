"""Text, symbols and values to entries and back; stop strings."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LETTERS, PEOPLE, newest

from service.bundle import Manifest
from service.errors import Problem
from service.tasks import Codec, TextStream


@pytest.fixture(scope="module")
def letters(models: Path) -> Codec:
    return Codec(newest(models, "tiny-letters").manifest)


@pytest.fixture(scope="module")
def people(models: Path) -> Codec:
    return Codec(newest(models, "tiny-people").manifest)


@pytest.fixture(scope="module")
def weather(models: Path) -> Codec:
    return Codec(newest(models, "tiny-weather").manifest)


@pytest.fixture(scope="module")
def single(models: Path) -> Codec:
    return Codec(newest(models, "tiny-single").manifest)


def refused(codec: Codec, inputs: object, pointer: str = "/inputs") -> Problem:
    with pytest.raises(Problem) as found:
        codec.encode(inputs, pointer)
    return found.value


# ---------------------------------------------------------------------- symbols


@given(text=st.text(st.sampled_from(LETTERS), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_text_comes_back_from_its_entries(text: str, models: Path) -> None:
    codec = Codec(newest(models, "tiny-letters").manifest)
    found = codec.encode(text)
    assert "".join(map(codec.text, found.tolist())) == text
    assert (codec.encode(list(text)) == found).all() and (codec.encode(found.tolist()) == found).all()


ONE = st.one_of(
    st.sampled_from([*LETTERS, "Z", "ab", "", "go", "é", None, True, False]),
    st.integers(-3, 12),
    st.floats(),
    st.just(2**70),
    st.lists(st.none() | st.booleans() | st.floats() | st.integers(-(10**39), 10**39), max_size=4),
    st.dictionaries(st.sampled_from(["temperature", "load", "x"]), st.floats() | st.none(), max_size=3),
)


@pytest.mark.parametrize("model", ["tiny-letters", "tiny-tags", "tiny-people", "tiny-weather", "tiny-single"])
@given(inputs=ONE | st.lists(ONE, max_size=2))
@settings(max_examples=100, deadline=None)
def test_a_single_step_is_what_encoding_it_gives_or_nothing(inputs: object, model: str, models: Path) -> None:
    codec = Codec(newest(models, model).manifest)
    single = codec.single(inputs)
    try:
        entries = codec.encode(inputs)
    except Problem:
        assert single is None
        return
    if single is not None:
        assert codec.column([single]).tobytes() == entries.tobytes() and len(entries) == 1
    elif len(entries) == 1:
        assert isinstance(inputs, str)  # where a symbol is more than a character


@given(text=st.text(st.sampled_from([*LETTERS, "Z", "é", "\U0001f600"]), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_first_unknown_symbol_is_named(text: str, models: Path) -> None:
    codec = Codec(newest(models, "tiny-letters").manifest)
    unknown = [i for i, symbol in enumerate(text) if symbol not in LETTERS]
    if not unknown:
        assert len(codec.encode(text)) == len(text)
        return
    problem = refused(codec, text)
    assert problem.code == "unknown_symbol"
    assert (problem.members["index"], problem.members["symbol"]) == (unknown[0], text[unknown[0]])


def test_entries_come_back_from_their_bytes(letters: Codec, weather: Codec) -> None:
    for codec, inputs in ((letters, "abc"), (weather, [[1, 2], [3, 4]])):
        found = codec.encode(inputs)
        assert (codec.entries(found.tobytes()) == found).all()
        assert codec.entries(b"").shape == codec.none().shape


def test_words_are_split_and_lowered(people: Codec) -> None:
    assert people.encode("Anna has HER keys.").tolist() == [1, 2, 3, 5, 0]


@pytest.mark.parametrize(
    ("inputs", "pointer"),
    [(["anna", "cat"], "/inputs/1"), ([0, 99], "/inputs/1"), ([-1], "/inputs/0"), ("anna cat", "/inputs")],
)
def test_an_unknown_symbol_has_a_pointer(inputs: object, pointer: str, people: Codec) -> None:
    problem = refused(people, inputs)
    assert problem.code == "unknown_symbol" and problem.members["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize("inputs", ["", [], None, 5, {"a": 1}, [1.5], [True], [None], [["a"]]])
def test_what_is_no_sequence_of_symbols_is_refused(inputs: object, letters: Codec) -> None:
    assert refused(letters, inputs).code == "invalid_input"


def test_a_pointer_begins_where_it_is_told(letters: Codec) -> None:
    assert refused(letters, ["a", "Z"], "/sequences/3").members["errors"][0]["pointer"] == "/sequences/3/1"


def test_the_start_symbol(letters: Codec, people: Codec) -> None:
    assert letters.start().tolist() == [0]
    with pytest.raises(Problem) as found:
        people.start()
    assert found.value.code == "empty_session"


# ---------------------------------------------------------------------- values


def test_values_are_float32_in_the_features_order(weather: Codec) -> None:
    found = weather.encode([[0.1, 1], {"hour": 2, "temperature": -3.5}])
    assert found.dtype == np.float32 and found.tolist() == [[float(np.float32(0.1)), 1.0], [-3.5, 2.0]]


def test_a_single_feature_needs_no_inner_list(single: Codec) -> None:
    assert single.encode([1, [2], {"load": 3}]).tolist() == [[1.0], [2.0], [3.0]]


FLOAT32_MAX = 3.4028234663852886e38


@pytest.mark.parametrize("value", [FLOAT32_MAX, -FLOAT32_MAX, 0, -0.0, 1e-45])
def test_every_finite_float32_is_taken(value: float, single: Codec) -> None:
    assert single.encode([value]).tolist() == [[float(np.float32(value))]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 10**400, "1", True, [1, 2], {}])
def test_what_is_no_finite_float32_is_refused(value: object, single: Codec) -> None:
    problem = refused(single, [1, value])
    assert problem.code == "invalid_input"
    assert problem.members["errors"][0]["pointer"].startswith("/inputs/1")


def test_nulls_take_the_last_value_and_before_any_the_mean(weather: Codec) -> None:
    entries = weather.encode([[None, 1], [5, 2], [None, 3]])
    assert weather.fill(entries, None)[:, 0].tolist() == [12.0, 5.0, 5.0]
    assert weather.fill(entries, np.array([7, 0], "<f4"))[:, 0].tolist() == [7.0, 5.0, 5.0]
    assert np.isnan(entries[0, 0])


def test_nulls_of_a_mean_rule_take_the_mean(single: Codec) -> None:
    assert single.fill(single.encode([5, None]), None).tolist() == [[5.0], [40.0]]


def test_a_null_without_a_rule_is_refused_by_name(weather: Codec) -> None:
    problem = refused(weather, [[1, None]])
    assert "hour" in problem.detail and problem.members["errors"][0]["pointer"] == "/inputs/0/1"


def test_the_future_is_told_for_the_steps_that_are_fed_back(weather: Codec) -> None:
    assert weather.future([{"hour": 1}, {"hour": 2}], 3) == [{"hour": 1.0}, {"hour": 2.0}]
    assert weather.future(None, 1) == []
    assert weather.given_features() == ["hour"]


def test_a_forecast_feeds_back_what_it_predicted_and_was_told(weather: Codec) -> None:
    assert weather.next_entry(np.array([9.5]), {"hour": 3.0}).tolist() == [9.5, 3.0]
    assert weather.next_entry(np.array([9.5]), {"hour": 3.0, "temperature": 1.0}).tolist() == [1.0, 3.0]


# ---------------------------------------------------------------------- outputs


def test_alternatives_are_the_most_likely_first(letters: Codec) -> None:
    logits = np.zeros(13, np.float32)
    logits[[4, 7]] = 2, 3
    found = letters.alternatives(logits, 3)
    assert [one.token for one in found] == [7, 4, 0]
    assert [one.text for one in found] == [LETTERS[7], LETTERS[4], LETTERS[0]]
    assert sum(math.exp(one.logprob) for one in letters.alternatives(logits, 99)) == pytest.approx(1)


def test_a_language_models_surprise_is_that_of_the_entry_before(letters: Codec) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 13)).astype(np.float32)
    entries = np.array([4, 5, 6], "<i4")
    shown = letters.predictions({"logits": logits}, 8, {"logits": logits[0]}, entries, 13)
    assert [one["position"] for one in shown] == [8, 9, 10]
    for i, before in enumerate([logits[0], logits[0], logits[1]]):
        expected = next(a.logprob for a in letters.alternatives(before, 13) if a.token == entries[i])
        assert shown[i]["surprise"] == pytest.approx(-expected)


def test_the_first_entry_of_all_has_no_surprise(letters: Codec) -> None:
    shown = letters.predictions({"logits": np.zeros((2, 13), np.float32)}, 1, None, np.array([1, 2]), 1)
    assert "surprise" not in shown[0] and shown[1]["surprise"] == pytest.approx(math.log(13))


def test_a_classifiers_probabilities_name_the_labels(people: Codec) -> None:
    shown = people.predictions({"logits": np.array([[0.0, 3.0, 0.0]], np.float32)}, 1, None, np.array([1]), 5)[0]
    assert shown["label"] == "anna" and list(shown["probabilities"]) == PEOPLE
    assert sum(shown["probabilities"].values()) == pytest.approx(1) and "surprise" not in shown


def test_a_forecasters_numbers_have_names(weather: Codec) -> None:
    outputs = {"mean": np.array([[1.5]]), "quantiles": np.array([[[1.0], [2.0], [3.0]]])}
    shown = weather.predictions(outputs, 4, None, np.array([[1, 2]], "<f4"), 5)[0]
    assert shown["mean"] == {"temperature": 1.5}
    assert shown["quantiles"] == {"0.1": {"temperature": 1.0}, "0.5": {"temperature": 2.0}, "0.9": {"temperature": 3.0}}


def wide(models: Path) -> Codec:
    """A forecaster of nine features with three quantiles each."""
    parts = newest(models, "tiny-weather").manifest.model_dump(mode="json")
    names = [f"f{i}" for i in range(9)]
    parts["features"] = [{"name": name} for name in names]
    parts["targets"] = [{"name": name, "std": 1.0 + i} for i, name in enumerate(names)]
    parts["inputs"][0]["shape"] = ["T", "B", 9]
    for output in parts["outputs"]:
        output["shape"] = ["T", "B", 9] if output["name"] == "mean" else ["T", "B", 3, 9]
    return Codec(Manifest.model_validate(parts))


@given(cut=st.integers(1, 39), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_surprises_of_many_values_do_not_depend_on_the_cut(cut: int, seed: int, models: Path) -> None:
    rng, codec = np.random.default_rng(seed), wide(models)
    outputs = {"mean": rng.normal(size=(40, 9)), "quantiles": rng.normal(size=(40, 3, 9)).astype(np.float32)}
    entries = rng.normal(size=(40, 9)).astype("<f4")
    whole = codec.predictions(outputs, 1, None, entries, 5)
    first = codec.predictions({k: v[:cut] for k, v in outputs.items()}, 1, None, entries[:cut], 5)
    before = {name: array[cut - 1] for name, array in outputs.items()}
    rest = codec.predictions({k: v[cut:] for k, v in outputs.items()}, cut + 1, before, entries[cut:], 5)
    assert first + rest == whole


# ---------------------------------------------------------------------- text streams


def stream(manifest: Manifest, tokens: list[int], stop: list[str]) -> tuple[list[str], str, bool]:
    """(the pieces, what was held back at the end, whether a stop string ended it)."""
    found = TextStream(Codec(manifest), stop)
    pieces: list[str] = []
    for token in tokens:
        piece, stopped = found.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, found.flush(), True
    return pieces, found.flush(), False


short_text = st.lists(st.integers(3, 5), max_size=30)
stops = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=4)


@given(tokens=short_text, stop=stops)
@settings(max_examples=300, deadline=None)
def test_pieces_make_the_text_up_to_the_first_stop(tokens: list[int], stop: list[str], models: Path) -> None:
    manifest = newest_letters(models)
    whole = "".join(LETTERS[token] for token in tokens)
    pieces, rest, stopped = stream(manifest, tokens, stop)
    ends = [whole.index(one) + len(one) for one in stop if one in whole]
    if not ends:
        assert not stopped and "".join(pieces) + rest == whole
        return
    seen = whole[: min(ends)]
    assert stopped and rest == "" and len(pieces) == min(ends)
    assert "".join(pieces) == seen[: min(seen.index(one) for one in stop if one in seen)]


@given(tokens=short_text, stop=stops)
@settings(max_examples=100, deadline=None)
def test_nothing_is_shown_that_a_stop_string_might_take_back(tokens: list[int], stop: list[str], models: Path) -> None:
    found = TextStream(Codec(newest_letters(models)), stop)
    shown = ""
    for token in tokens:
        piece, stopped = found.push(token)
        shown += piece
        if stopped:
            break
    assert all(one not in shown for one in stop)


@given(tokens=short_text, stop=stops)
@settings(max_examples=100, deadline=None)
def test_no_more_is_held_back_than_needed(tokens: list[int], stop: list[str], models: Path) -> None:
    _, rest, stopped = stream(newest_letters(models), tokens, stop)
    assert stopped or len(rest) < max(map(len, stop), default=1)


_cache: dict[str, Manifest] = {}


def newest_letters(models: Path) -> Manifest:
    if "letters" not in _cache:
        _cache["letters"] = newest(models, "tiny-letters").manifest
    return _cache["letters"]


def test_words_are_joined_by_spaces(people: Codec) -> None:
    assert stream(people.manifest, [1, 2, 5], [])[0] == ["anna", " has", " keys"]


def test_a_stop_string_may_hold_the_space_between_words(people: Codec) -> None:
    pieces, rest, stopped = stream(people.manifest, [1, 2, 5], ["s k"])
    assert stopped and "".join(pieces) == "anna ha" and rest == ""
