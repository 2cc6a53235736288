"""The lecture's experiments at small sizes: the claims hold, whatever the exact numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from training.__main__ import app
from training.lecture.cells import WITH_CHRONO, Leaky, cell
from training.lecture.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[1]

Findings = dict[str, dict[str, Any]]


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["lecture", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Path]:
    out = tmp_path_factory.mktemp("figures")
    code, said, complaint = call("--quick", "--models", str(ROOT / "models"), "--out", str(out))
    assert code == 0, said + complaint
    return json.loads(said.splitlines()[-1]), out


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_claim_holds(found: tuple[Findings, Path], name: str) -> None:
    assert found[0][name]["holds"], found[0][name]


@pytest.mark.slow
def test_each_experiment_has_a_small_figure(found: tuple[Findings, Path]) -> None:
    names = {path.name: path.stat().st_size for path in found[1].iterdir()}
    assert names.keys() == {f"lecture-{name}.svg" for name in EXPERIMENTS}
    assert max(names.values()) < 128 * 1024


@pytest.mark.slow
def test_only_the_recurrent_network_notices_the_order_of_its_inputs(found: tuple[Findings, Path]) -> None:
    figures = found[0]["windows"]["figures"]
    for width in (3, 12):
        assert figures[f"mlp of {width}: greatest difference of the curves"] < 1e-9
        assert figures[f"rnn of {width}: greatest difference of the curves"] > 1e-3


@pytest.mark.slow
def test_the_gradients_written_out_are_those_of_autograd(found: tuple[Findings, Path]) -> None:
    assert max(found[0]["bptt"]["figures"].values()) < 1e-6


@pytest.mark.slow
def test_only_a_carried_memory_knows_who_was_named(found: tuple[Findings, Path]) -> None:
    figures = found[0]["facts"]["figures"]
    assert figures["who: right, memory carried"] > 0.9 > figures["who: right, 10 words kept"] + 0.5


def test_an_unknown_experiment_is_named() -> None:
    code, _, complaint = call("--only", "windws")
    assert code == 1 and "'windws'" in complaint and "windows" in complaint


def test_without_the_shipped_models_it_says_what_to_give(tmp_path: Path) -> None:
    code, _, complaint = call("--quick", "--only", "sentence", "--models", str(tmp_path))
    assert code == 1 and "--models" in complaint and "Traceback" not in complaint


def test_quick_writes_nothing_unless_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("--quick", "--only", "bptt")[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WITH_CHRONO)
def test_chrono_start_remembers_longer(kind: str) -> None:
    """The last of 100 states still depends on the first."""

    def left(chrono: int) -> float:
        torch.manual_seed(0)
        made = cell(kind, 1, 16, chrono)
        inputs = torch.randn(100, 4, 1, requires_grad=True)
        gradient = torch.autograd.grad(made(inputs)[0][-1].sum(), inputs)[0]
        return float(gradient[0].norm() / gradient[-1].norm())

    assert left(100) > 1e3 * left(0)


def test_a_leaky_cell_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    made = Leaky(2, 5)
    inputs = torch.randn(7, 3, 2)
    whole, last = made(inputs)
    first, state = made(inputs[:4])
    second, end = made(inputs[4:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=0)
    torch.testing.assert_close(end, last, rtol=0, atol=0)


def test_the_page_has_every_experiment_with_its_figure() -> None:
    page = (ROOT / "docs" / "lecture.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        assert f"\n## {name}\n" in page and f"(plots/lecture-{name}.svg)" in page
        assert (ROOT / "docs" / "plots" / f"lecture-{name}.svg").is_file()
