import json
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint, device, loop
from training.checkpoint import CheckpointError, Progress
from training.config import Recipe, RecipeError, recipe_from
from training.job import Job, prepare
from training.report import CURVES, Line, Report, board

TEXT = "to be or not to be, that is the question. " * 40


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "text.txt"
    path.write_text(TEXT)
    plain = {"name": "tiny", "task": "language-model", "data": {"path": str(path)}}
    sizes = ["model.layers=2", "model.hidden=12", "model.embedding=6", "model.dropout=0.2", "sample.length=5"]
    run = ["train.batch=4", "train.steps=8", "train.max_steps=60", "train.evaluate_steps=30", "train.warmup_steps=5"]
    return recipe_from(plain, [*sizes, *run, *overrides])


def job(folder: Path, *overrides: str) -> Job:
    return prepare(recipe(folder, *overrides), folder, "train")


class StopAt(Report):
    """Sends this process SIGTERM at a step, as an operator would."""

    def __init__(self, step: int) -> None:
        super().__init__("", quiet=True)
        self.at = step

    def step(self, line: Line) -> None:
        if line.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


QUIET = Report("", quiet=True)


@pytest.mark.parametrize(
    ("cell", "form"), [("rnn", "stream"), ("gru", "stream"), ("lstm", "stream"), ("leaky", "windowed")]
)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path: Path, cell: str, form: str) -> None:
    overrides = [f"model.cell={cell}", f"train.form={form}"]
    loop.train(job(tmp_path, *overrides), tmp_path / "whole", QUIET)
    stopped = loop.train(job(tmp_path, *overrides), tmp_path / "cut", StopAt(47))
    assert stopped.step == 47
    loop.train(job(tmp_path, *overrides), tmp_path / "cut", QUIET, resume=True)
    for name in ("model", "optimiser", "state"):
        whole, cut = (load_file(tmp_path / run / "last" / f"{name}.safetensors") for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert [key for key in whole if not torch.equal(whole[key], cut[key])] == []
    whole_best, cut_best = (load_file(tmp_path / run / "best" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole_best[key], cut_best[key]) for key in whole_best)


def test_a_run_learns_and_writes_only_its_folder(tmp_path: Path) -> None:
    progress = loop.train(job(tmp_path, "train.learning_rate=2e-2", "train.max_steps=120"), tmp_path / "run", QUIET)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [line["step"] for line in history] == [30, 60, 90, 120]
    assert history[-1]["validation"] < history[0]["validation"] - 0.5
    assert progress.best == min(line["validation"] for line in history)
    assert (tmp_path / "run" / "plots" / "learning-curve.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text.txt"]
    meta = checkpoint.read_meta(tmp_path / "run")
    assert meta["symbols"] == sorted(set(TEXT) | {"\n"})
    assert meta["recipe"]["train"]["max_steps"] == 120


def test_bf16_is_refused_where_the_processor_can_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "bf16_runs", lambda *_: False)
    with pytest.raises(RecipeError, match="use auto or fp32"):
        loop.train(job(tmp_path, "train.precision=bf16"), tmp_path / "run", QUIET)


@pytest.mark.skipif(not device.bf16_runs("cpu", "lstm"), reason="torch runs no lstm in bf16 on this processor")
def test_bf16_learns_too(tmp_path: Path) -> None:
    progress = loop.train(job(tmp_path, "train.precision=bf16"), tmp_path / "run", QUIET)
    assert progress.best is not None and progress.best < 5


def test_accumulation_changes_nothing_but_the_rounding(tmp_path: Path) -> None:
    plain = ["model.dropout=0", "train.max_steps=20", "train.evaluate_steps=5"]
    runs = []
    for parts in (1, 3, 9):  # of 4 rows
        loop.train(job(tmp_path, *plain, f"train.accumulate={parts}"), tmp_path / str(parts), QUIET)
        runs.append(load_file(tmp_path / str(parts) / "last" / "model.safetensors"))
    for other in runs[1:]:
        assert max(float((other[key] - runs[0][key]).abs().max()) for key in other) < 1e-4


def test_parts_hold_every_row_once() -> None:
    for rows in range(1, 9):
        for count in range(1, 12):
            parts = loop.parts(rows, count)
            assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
            assert len(parts) == min(rows, count)


def test_the_average_is_what_is_scored_and_kept(tmp_path: Path) -> None:
    begun = job(tmp_path, "train.average=0.95")
    progress = loop.train(begun, tmp_path / "run", QUIET)
    assert begun.average is not None and progress.best_step == 60
    best, last, average = (
        load_file(tmp_path / "run" / name / f"{file}.safetensors")
        for name, file in (("best", "model"), ("last", "model"), ("last", "average"))
    )
    assert all(torch.equal(best[key], average[key]) for key in best)
    assert not any(torch.equal(best[key], last[key]) for key in best)
    figure = loop.validate(begun.average, begun.task, begun.corpus)
    assert begun.task.figure(figure) == pytest.approx(progress.best)


def test_an_average_is_a_plain_mean_at_first_and_decays_later() -> None:
    average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    weight = average.weight
    with torch.no_grad():
        weight.fill_(5.0)
        model.weight.fill_(1.0)
    loop.follow(average, model, 0.999, 1)
    assert weight.item() == pytest.approx(0.1 * 5 + 0.9 * 1)
    with torch.no_grad():
        weight.fill_(0.0)
    loop.follow(average, model, 0.9, 10_000)
    assert weight.item() == pytest.approx(0.1)


def test_a_run_that_was_begun_without_an_average_can_go_on_with_one(tmp_path: Path) -> None:
    loop.train(job(tmp_path, "train.max_steps=2"), tmp_path / "run", QUIET)
    loop.train(job(tmp_path, "train.average=0.9", "train.max_steps=4"), tmp_path / "run", QUIET, resume=True)
    assert (tmp_path / "run" / "last" / "average.safetensors").exists()


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    frozen = ["train.learning_rate=0", "train.max_steps=60", "train.evaluate_steps=5", "train.patience=3"]
    progress = loop.train(job(tmp_path, *frozen), tmp_path / "run", QUIET)
    assert (progress.step, progress.best_step) == (20, 5)
    again = loop.train(job(tmp_path, *frozen), tmp_path / "run", QUIET, resume=True)
    assert again.step == 20
    more = loop.train(job(tmp_path, *frozen, "train.patience=5"), tmp_path / "run", QUIET, resume=True)
    assert more.step == 30


def test_the_learning_rate_warms_up_and_falls_to_nearly_nothing(tmp_path: Path) -> None:
    train = recipe(tmp_path).train
    rates = [loop.learning_rate(train, step, step / 60) for step in range(61)]
    assert rates[0] == pytest.approx(train.learning_rate / 5)
    assert max(rates) <= train.learning_rate
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(train.learning_rate * 1e-3)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = job(tmp_path, "train.checkpoint_minutes=0")
    real = loop.update

    def breaks(job: Job, *given: object) -> object:
        if job.optimiser.state and next(iter(job.optimiser.state.values()))["step"] >= 7:
            with torch.no_grad():
                next(job.model.parameters()).fill_(math.nan)
        return real(job, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "update", breaks)
    with pytest.raises(loop.NonFiniteError, match=r"the checkpoint of step 7 is kept: lower train\.learning_rate"):
        loop.train(begun, tmp_path / "run", QUIET)
    kept = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = job(tmp_path, "train.checkpoint_minutes=0")
    real = loop.update

    def breaks(job: Job, *given: object) -> object:
        done = real(job, *given)  # type: ignore[arg-type]
        if next(iter(job.optimiser.state.values()))["step"] == 7:
            with torch.no_grad():
                next(job.model.parameters()).fill_(math.inf)
        return done

    monkeypatch.setattr(loop, "update", breaks)
    with pytest.raises(
        loop.NonFiniteError, match="a weight is no longer a number after step 7; the checkpoint of step 6"
    ):
        loop.train(begun, tmp_path / "run", QUIET)
    kept = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_first_loss_that_is_no_number_says_that_nothing_was_saved(tmp_path: Path) -> None:
    begun = job(tmp_path)
    with torch.no_grad():
        next(begun.model.parameters()).fill_(math.nan)
    with pytest.raises(loop.NonFiniteError, match="nothing was saved yet"):
        loop.train(begun, tmp_path / "run", QUIET)
    assert not list((tmp_path / "run").glob("*"))


def test_every_evaluation_is_a_line_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("bits", quiet=True, log=tmp_path / "log.jsonl")
    loop.train(job(tmp_path, "train.evaluate_steps=20"), tmp_path / "run", report)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert all(line["event"] == "evaluation" and line["validation"] > 0 and line["baselines"] for line in lines)
    assert capsys.readouterr().out == ""


def test_every_evaluation_is_a_point_of_each_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        points: ClassVar[list[tuple[str, int]]] = []

        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            assert math.isfinite(value)
            self.points.append((tag, step))

        def flush(self) -> None:
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    loop.train(job(tmp_path), tmp_path / "run", Report("", quiet=True, board=board(tmp_path / "run")))
    assert Writer.points == [(name, step) for step in (30, 60) for name in CURVES]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match="pip install tensorboard"):
        board(tmp_path / "run")


@pytest.mark.parametrize(("hidden", "bf16"), [(64, False), (128, True)])
def test_auto_takes_what_this_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int, bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    train = job(tmp_path, f"model.hidden={hidden}", "train.device=cpu").recipe.train
    assert (train.device, train.precision) == ("cpu", "bf16" if bf16 else "fp32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert job(tmp_path, f"model.hidden={hidden}", "train.device=cpu").recipe.train.precision == "fp32"


def test_a_device_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"train\.device is mps"):
        job(tmp_path, "train.device=mps")


def test_the_first_signal_saves_and_the_second_interrupts() -> None:
    with loop.interrupts() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path: Path) -> None:
    loop.train(job(tmp_path, "train.max_steps=2"), tmp_path / "run", QUIET)
    with pytest.raises(CheckpointError, match="--resume"):
        loop.train(job(tmp_path, "train.max_steps=2"), tmp_path / "run", QUIET)


def test_resume_refuses_other_symbols_shapes_and_data(tmp_path: Path) -> None:
    loop.train(job(tmp_path, "train.max_steps=2"), tmp_path / "run", QUIET)
    with pytest.raises(CheckpointError, match="hidden"):
        loop.train(job(tmp_path, "model.hidden=13"), tmp_path / "run", QUIET, resume=True)
    with pytest.raises(CheckpointError, match=r"train\.batch"):
        loop.train(job(tmp_path, "train.batch=5"), tmp_path / "run", QUIET, resume=True)
    old = checkpoint.read_meta(tmp_path / "run")
    with pytest.raises(CheckpointError, match="new \\['€'\\]"):
        checkpoint.refuse_mismatch(old, {**old, "symbols": [*old["symbols"], "€"]})
    with pytest.raises(CheckpointError, match="data changed"):
        checkpoint.refuse_mismatch(old, {**old, "data": {"source": "x", "sha256": "y"}})


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    loop.train(job(tmp_path, "train.max_steps=2"), tmp_path / "run", QUIET)
    (tmp_path / "run" / "last").rename(tmp_path / "run" / "last.old")
    progress = loop.train(job(tmp_path, "train.max_steps=4"), tmp_path / "run", QUIET, resume=True)
    assert progress.step == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best", "history.json", "last", "plots"]
    with pytest.raises(CheckpointError, match="train first"):
        checkpoint.find(tmp_path, "best")


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    loop.train(job(tmp_path, "train.max_steps=2"), tmp_path / "run", QUIET)
    other = job(tmp_path, "model.hidden=13").model
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load_weights(tmp_path / "run" / "best", other)


def test_weight_decay_takes_matrices_only(tmp_path: Path) -> None:
    decayed, spared = job(tmp_path).optimiser.param_groups
    assert decayed["weight_decay"] > 0 == spared["weight_decay"]
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])


def test_progress_is_plain_json() -> None:
    assert Progress(**json.loads(json.dumps(vars(Progress(step=3, best=1.5))))) == Progress(step=3, best=1.5)
