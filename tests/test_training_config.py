from pathlib import Path

import pytest

from training.config import RecipeError, read_recipe, recipe_from, recipe_names

PLAIN = {"name": "x", "task": "language-model", "train": {"max_steps": 1}}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads(name: str) -> None:
    data = read_recipe(name)
    recipe = recipe_from(data, ["data.path=x"])
    assert recipe.name == name
    assert recipe_from(recipe.to_json()) == recipe


def test_overrides_take_toml_values_and_bare_words() -> None:
    recipe = recipe_from(
        PLAIN,
        ["model.hidden=512", "model.cell=gru", "model.quantiles=[0.1, 0.9]", "train.learning_rate=1", "data.targets=t"],
    )
    assert (recipe.model.hidden, recipe.model.cell, recipe.model.quantiles) == (512, "gru", (0.1, 0.9))
    assert recipe.train.learning_rate == 1.0
    assert recipe.data.targets == ("t",)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hiden=3", "'model.hidden'"),
        ("modle.hidden=3", "'model'"),
        ("model.hidden=many", "must be of type int"),
        ("model.hidden=true", "must be of type int"),
        ("model=3", "is a section"),
        ("task.kind=3", "'task' is no section"),
        ("model.hidden", "write section.key=value"),
        ("train.form=sideways", "stream, windowed"),
        ("task=guess", "language-model, forecaster, classifier"),
        ("train.batch=0", "at least 1"),
        ("train.max_steps=0", "--max-minutes"),
        ("data.test=1.5", "leave something to train on"),
    ],
)
def test_wrong_overrides_say_what_to_write(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=r".+") as error:
        recipe_from(PLAIN, [override])
    assert says in str(error.value)


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="shakespeare"):
        read_recipe("shakespear")
    broken = tmp_path / "broken.toml"
    broken.write_text("task = ")
    with pytest.raises(RecipeError, match=r"broken\.toml"):
        read_recipe(str(broken))


def test_windows_cannot_be_whole_sequences() -> None:
    assert recipe_from(read_recipe("adding")).train.steps == 0
    with pytest.raises(RecipeError, match=r"train\.steps"):
        recipe_from(read_recipe("adding"), ["train.form=windowed"])
