"""Each kind of task, trained for a moment, exported and streamed through the service, errs as its evaluation says."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Server
from typer.testing import CliRunner
from wav import chirps

from training.__main__ import app
from training.checkpoint import load_model
from training.data import Corpus
from training.evaluate import label_chances, run_corpus
from training.export import export_run
from training.sample import answers

SMALL = "--set model.layers=1 --set model.hidden=8 --set model.embedding=4 --set train.max_steps=12 --quiet"
SMALL += " --set train.evaluate_steps=6 --set train.precision=fp32 --set train.batch=4 --set sample.length=5"
CLOSE = 1e-4


@dataclass
class Trained:
    """A model, the corpus it was trained on and the figures that training printed."""

    name: str
    corpus: Corpus
    metrics: dict[str, Any]


def series_file(path: Path) -> Path:
    rng = random.Random(1)
    lines = ["time,pump,heat,load,wet,loud,mood"]
    for pump in "ab":
        for i in range(420):
            heat = 10 + 5 * math.sin(i / 24 * 6.283) + rng.gauss(0, 0.5)
            told = f"{heat:.3f},{40 + heat * 2 + rng.gauss(0, 1):.3f}" if i % 37 else ","
            labels = f"{int(heat > 11)},{int(rng.random() < 0.2)},m{i % 3}"
            lines.append(f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{pump},{told},{labels}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def gestures_file(path: Path) -> Path:
    rng = random.Random(2)
    lines = ["gesture,x,y,kind"]
    for i in range(40):
        kind = rng.choice(["wave", "nod"])
        for step in range(rng.randint(4, 9)):
            x = math.sin(step) if kind == "wave" else 0.1 * step
            lines.append(f"g{i},{x + rng.gauss(0, 0.1):.3f},{rng.gauss(0, 1):.3f},{kind}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chorales_file(path: Path) -> Path:
    rng = random.Random(4)
    parts = {"train": 8, "valid": 2, "test": 3}
    chorales = {
        name: [[[48 + rng.randrange(12), 67] for _ in range(rng.randint(5, 30))] for _ in range(count)]
        for name, count in parts.items()
    }
    path.write_text(json.dumps(chorales), encoding="utf-8")
    return path


def phones_file(path: Path) -> Path:
    rng = random.Random(3)
    lines = ["phone,pitch"] + [
        f"{phone},{100 + 20 * 'aiu'.index(phone) + rng.gauss(0, 2):.2f}" for phone in rng.choices("aiu", k=300)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text_of_book(path: Path) -> Path:
    path.write_text("Größe zählt, ein schöner Fuß 😀 und Straßen.\n" * 60, encoding="utf-8")
    return path


def pairs_of(path: Path) -> Path:
    path.write_text("".join(f"{a}{b}\t{b}{a}\n" for a in "abcdefgh" for b in "ijklmnop"), encoding="utf-8")
    return path


KINDS: dict[str, tuple[Callable[[Path], Path] | None, str, str]] = {
    "horizons": (
        series_file,
        "series.csv",
        "--time time --series pump --target heat --target load --horizon 1 --horizon 6",
    ),
    "later": (series_file, "series.csv", "--time time --series pump --target heat --horizon 6"),
    "crossed": (
        series_file,
        "series.csv",
        "--time time --series pump --target heat --set data.calibration=0.0 --set data.folds=2 --set model.norm=true",
    ),
    "regression": (series_file, "series.csv", "--recipe regression --time time --series pump --target load"),
    "voice": (phones_file, "phones.csv", "--recipe regression --set data.symbol=phone --target pitch"),
    "moods": (series_file, "series.csv", "--recipe multi-label --time time --series pump --target wet --target loud"),
    "chorales": (chorales_file, "chorales.json", "--recipe jsb --set data.transpose=1"),
    "gestures": (
        gestures_file,
        "gestures.csv",
        "--recipe sequences --series gesture --label kind --set model.norm=true --set model.noise=0.5",
    ),
    "bytes": (text_of_book, "book.txt", "--tokens bytes"),
    "bpe": (text_of_book, "book.txt", "--recipe bpe --set data.vocabulary=300"),
    "pairs": (pairs_of, "pairs.tsv", ""),
    "chirps": (chirps, "chirps", ""),
    "adding": (None, "", "--recipe adding --set data.steps=30 --set data.sequences=100 --set model.chrono=30"),
    "copy": (None, "", "--recipe copy-memory --set data.steps=30 --set data.sequences=100 --set model.chrono=30"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Trained]:
    """All kinds, in folder/models."""
    torch.set_num_threads(1)
    return {name: train(folder, name) for name in KINDS}


def train(folder: Path, name: str) -> Trained:
    make, file, options = KINDS[name]
    run = folder / "runs" / name
    data = ["--data", str(make(folder / file))] if make is not None else []
    done = CliRunner().invoke(app, ["train", *data, "--out", str(run), *options.split(), *SMALL.split()])
    assert done.exit_code == 0, done.output
    _, meta = load_model(run)
    export_run(run, folder / "models", name)
    return Trained(name, run_corpus(run, meta, folder), json.loads((run / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def server(folder: Path, trained: dict[str, Trained]) -> Iterator[Server]:
    one = Server(folder / "models", folder)
    yield one.start()
    one.close()


def streamed(server: Server, model: str, session: str, steps: list[Any], chunk: int = 50) -> list[dict[str, Any]]:
    """A prediction a step, fed in chunks that the state must be carried over."""
    path, said = f"/v1/sessions/{model}-{session}/steps", []
    for at in range(0, len(steps), chunk):
        body = {"model": model, "inputs": steps[at : at + chunk], "predictions": "all"}
        said += server.ok(server.post(path, body))["predictions"]
    return said


def error_of(said: list[float], wanted: list[float], weights: list[float]) -> float:
    apart = [abs(a - b) for a, b, weight in zip(said, wanted, weights, strict=True) if weight]
    return sum(apart) / len(apart)


def test_direct_horizons_and_their_calibrated_quantiles(server: Server, trained: dict[str, Trained]) -> None:
    one = trained["horizons"]
    for sequence in one.corpus.test:
        said = streamed(server, one.name, sequence.name, sequence.inputs.tolist())
        assert set(said[0]["horizons"]) == {"1", "6"} and "mean" not in said[0]
        for column, name in enumerate(one.corpus.column_names):
            horizon, target = one.corpus.horizons[column // 2], ("heat", "load")[column % 2]
            at = [step["horizons"][str(horizon)]["quantiles"] for step in said]
            wanted, weights = sequence.targets[:, column].tolist(), sequence.weights[:, column].tolist()
            printed = one.metrics["by_entity"][sequence.name][name]["model"]
            assert error_of([q["0.5"][target] for q in at], wanted, weights) == pytest.approx(printed, abs=CLOSE)
            assert all(q["0.1"][target] <= q["0.5"][target] <= q["0.9"][target] for q in at)
            inside = [
                q["0.1"][target] <= w <= q["0.9"][target] for q, w, s in zip(at, wanted, weights, strict=True) if s
            ]
            covered = one.metrics["interval"]["covered"][name][sequence.name]
            assert sum(inside) / len(inside) == pytest.approx(covered, abs=1.5 / len(inside))
    assert one.metrics["interval"]["covered_before_calibration"] != one.metrics["interval"]["covered"]


def test_quantiles_that_were_calibrated_by_folds(server: Server, trained: dict[str, Trained]) -> None:
    one = trained["crossed"]
    for sequence in one.corpus.test:
        at = [step["quantiles"] for step in streamed(server, one.name, sequence.name, sequence.inputs.tolist())]
        wanted, weights = sequence.targets[:, 0].tolist(), sequence.weights[:, 0].tolist()
        printed = one.metrics["by_entity"][sequence.name]["heat"]["model"]
        assert error_of([q["0.5"]["heat"] for q in at], wanted, weights) == pytest.approx(printed, abs=CLOSE)
        inside = [q["0.1"]["heat"] <= w <= q["0.9"]["heat"] for q, w, s in zip(at, wanted, weights, strict=True) if s]
        covered = one.metrics["interval"]["covered"]["heat"][sequence.name]
        assert sum(inside) / len(inside) == pytest.approx(covered, abs=1.5 / len(inside))
    assert one.metrics["interval"]["covered_before_calibration"] != one.metrics["interval"]["covered"]


def test_direct_horizons_are_rolled_by_the_next_step_alone(server: Server, trained: dict[str, Trained]) -> None:
    sequence = trained["horizons"].corpus.test[0]
    said = streamed(server, "horizons", "roll", sequence.inputs[:30].tolist())
    future = [{"wet": 0.0, "loud": 0.0}] * 3
    ahead = server.ok(server.post("/v1/sessions/horizons-roll/forecast", {"horizon": 4, "future": future}))["forecast"]
    assert ahead[0]["mean"] == pytest.approx(said[-1]["horizons"]["1"]["mean"], rel=1e-6)
    assert len(ahead) == 4 and all(set(step) == {"step", "mean", "quantiles"} for step in ahead)
    assert "surprise" in said[-1]


def test_a_model_that_skips_the_next_step_is_not_rolled(server: Server, trained: dict[str, Trained]) -> None:
    said = streamed(server, "later", "x", trained["later"].corpus.test[0].inputs[:10].tolist())
    assert set(said[0]["horizons"]) == {"6"} and "surprise" not in said[-1]
    refused = server.post(
        "/v1/sessions/later-x/forecast", {"horizon": 2, "future": [{"load": 1.0, "wet": 0, "loud": 0}]}
    )
    assert (refused.status_code, refused.json()["code"]) == (422, "task_mismatch")
    assert server.ok(server.http.get("/v1/models/later"))["outputs"][0]["horizons"] == [6]


@pytest.mark.parametrize("kind", ["regression", "voice"])
def test_regression(server: Server, trained: dict[str, Trained], kind: str) -> None:
    one = trained[kind]
    (target,) = one.corpus.target_names
    for sequence in one.corpus.test:
        inputs = sequence.inputs.tolist()
        steps = [one.corpus.symbols[i] for i in inputs] if one.corpus.symbols else inputs
        at = [step["quantiles"]["0.5"][target] for step in streamed(server, kind, sequence.name, steps)]
        error = error_of(at, sequence.targets[:, 0].tolist(), sequence.weights[:, 0].tolist())
        assert error == pytest.approx(one.metrics["by_entity"][sequence.name][target]["model"], abs=CLOSE)


@pytest.mark.parametrize("kind", ["moods", "chorales"])
def test_several_labels_a_step(server: Server, trained: dict[str, Trained], kind: str) -> None:
    one, nats, steps = trained[kind], 0.0, 0
    for sequence in one.corpus.test:
        said = streamed(server, kind, sequence.name, sequence.inputs.tolist())
        for step, wanted, weight in zip(said, sequence.targets.tolist(), sequence.weights.tolist(), strict=True):
            assert set(step) == {"probabilities", "position"}
            chances = [step["probabilities"][label] for label in one.corpus.labels]
            nats -= weight * sum(math.log(c if w else 1 - c) for c, w in zip(chances, wanted, strict=True))
            steps += weight > 0
    assert nats / steps == pytest.approx(one.metrics["model"], abs=CLOSE)


def test_a_label_with_growing_confidence(server: Server, trained: dict[str, Trained]) -> None:
    one, right = trained["gestures"], 0
    for sequence in one.corpus.test:
        said = streamed(server, "gestures", sequence.name, sequence.inputs.tolist(), chunk=2)
        right += said[-1]["label"] == one.corpus.labels[int(sequence.targets[-1])]
    assert right / len(one.corpus.test) == one.metrics["model"]
    assert list(one.metrics["by_share_seen"]) == ["25%", "50%", "75%", "100%"]


def test_sounds_in_pieces_of_any_length(server: Server, trained: dict[str, Trained], folder: Path) -> None:
    one, right = trained["chirps"], 0
    model, _ = load_model(folder / "runs" / "chirps")
    (heard,) = server.ok(server.http.get("/v1/models/chirps"))["inputs"]
    assert heard == {"name": "samples", "unit": "full scale", "rate": 8000, "hop": 80}
    for i, (sequence, chances) in enumerate(zip(one.corpus.test, label_chances(model, one.corpus.test), strict=True)):
        said = streamed(server, "chirps", f"s{i}", sequence.inputs.tolist(), chunk=(1, 3, 7)[i % 3])
        probabilities = [[step["probabilities"][label] for label in one.corpus.labels] for step in said]
        assert torch.allclose(torch.tensor(probabilities), chances, atol=CLOSE)
        right += said[-1]["label"] == one.corpus.labels[int(sequence.targets[-1])]
    assert right / len(one.corpus.test) == one.metrics["model"]
    assert server.verify("chirps-s0")["verified"] is True
    short = server.post("/v1/sessions/chirps-s0/steps", {"inputs": [[0.0] * 79]})
    assert (short.status_code, short.json()["detail"]) == (
        422,
        "79 values where 80 are needed: sample_1, ..., sample_80",
    )


def test_the_sum_at_the_last_step(server: Server, trained: dict[str, Trained]) -> None:
    one, errors = trained["adding"], []
    for i, sequence in enumerate(one.corpus.test):
        said = streamed(server, "adding", str(i), sequence.inputs.tolist(), chunk=7)
        errors.append(said[-1]["mean"]["sum"] - float(sequence.targets[-1, 0]))
    printed = one.metrics["squared_error"]["adding"]["sum"]
    assert sum(error**2 for error in errors) / len(errors) == pytest.approx(printed["model"], abs=CLOSE)
    assert len(errors) == printed["steps"]


def test_letters_that_come_again(server: Server, trained: dict[str, Trained]) -> None:
    one, nats = trained["copy"], []
    for i, sequence in enumerate(one.corpus.test):
        given = [one.corpus.symbols[symbol] for symbol in sequence.inputs]
        for step, label in zip(streamed(server, "copy", str(i), given, chunk=7), sequence.targets, strict=True):
            nats.append(-math.log(step["probabilities"][one.corpus.labels[label]]))
    assert sum(nats) / len(nats) == pytest.approx(one.metrics["nats per step"], abs=CLOSE)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_in_bytes(server: Server, trained: dict[str, Trained], kind: str) -> None:
    one = trained[kind]
    (sequence,) = one.corpus.test
    streamed(server, kind, "text", [one.corpus.start_symbol])
    tail = (b"".join(_bytes(one.corpus.symbols[i]) for i in sequence.targets.tolist())).decode("utf-8", "strict")
    body = {"model": kind, "inputs": tail, "predictions": "all"}
    said = server.ok(server.post(f"/v1/sessions/{kind}-text/steps", body))["predictions"]
    assert len(said) == len(sequence)
    bits = sum(step["surprise"] for step in said) / len(said) / math.log(2)
    assert bits == pytest.approx(one.metrics["model"], abs=CLOSE)
    characters = one.metrics["bits_per_character"] * len(tail)
    assert characters == pytest.approx(bits * len(said), rel=1e-4)


def _bytes(symbol: str) -> bytes:
    from service import bytepairs

    return bytepairs.to_bytes(symbol)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_characters_are_held_back_until_they_are_whole(server: Server, kind: str) -> None:
    """One token at a time, as few as 30 tokens of an untrained model, which breaks characters off as it likes."""
    body = {"model": kind, "inputs": "Größe 😀", "max_tokens": 60, "temperature": 1.5, "seed": 3}
    whole = server.ok(server.post(f"/v1/sessions/{kind}-whole/generate", body))
    expected = b"".join(_bytes(symbol) for symbol in symbols_of(server, f"{kind}-whole")[-60:]).decode(
        "utf-8", "replace"
    )
    assert whole["text"] == expected
    pieces = []
    with server.http.stream("POST", f"/v1/sessions/{kind}-piece/generate", json={**body, "stream": True}) as stream:
        pieces = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert "".join(piece.get("text", "") for piece in pieces) == expected
    assert "" in [piece["text"] for piece in pieces[:-1]]


def symbols_of(server: Server, session: str) -> list[str]:
    return [entry["input"] for entry in server.ok(server.http.get(f"/v1/sessions/{session}/log?limit=1000"))["data"]]


def test_the_log_of_a_byte_model_can_be_fed_again(server: Server) -> None:
    server.ok(server.post("/v1/sessions/bpe-first/steps", {"model": "bpe", "inputs": "schöne Größe"}))
    logged = symbols_of(server, "bpe-first")
    server.ok(server.post("/v1/sessions/bpe-again/steps", {"model": "bpe", "inputs": logged}))
    assert symbols_of(server, "bpe-again") == logged
    assert len(logged) < len("schöne Größe".encode())


def test_one_sequence_in_another_out(server: Server, trained: dict[str, Trained], folder: Path) -> None:
    one, right = trained["pairs"], 0
    model, _ = load_model(folder / "runs" / "pairs")
    for given, written, wanted in answers(model, one.corpus, one.corpus.test, 8):
        body = {"inputs": f"{given}\t", "max_tokens": 8, "temperature": 0, "stop": ["\n"]}
        said = server.ok(server.post("/v1/models/pairs/generate", body))["text"]
        assert said == written
        right += said == wanted
    assert right / len(one.corpus.test) == one.metrics["exact match"]
