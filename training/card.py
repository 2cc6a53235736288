"""The model card: what a person should know before calling a model, as the bundle's README.md."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.bundle import Manifest, Window

BASE = "http://localhost:8000/v1"
MAX_ROWS = 40
HEAR = """```python
import wave

import numpy as np
from recurra_client import Client

with wave.open("recording.wav") as file:  # {rate} samples a second, one channel, 16 bit
    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
steps = samples[: len(samples) // {hop} * {hop}].reshape(-1, {hop})
with Client("{base}") as client, client.session(model="{name}") as session:
    for at in range(0, len(steps), 100):  # in pieces of any length
        print(session.steps(steps[at : at + 100].tolist()).last.label)
```"""

Json = Any
Row = Sequence[Json]


def write(manifest: Manifest, pictures: Sequence[str] = (), example: Json = None) -> str:
    """The whole card in Markdown; pictures are file names in the same folder, `example` is what the calls feed."""
    sections = (
        ("", _title(manifest)),
        ("Inputs and outputs", _signature(manifest)),
        ("Call it", _calls(manifest, example or _example(manifest))),
        ("Figures", _figures(manifest)),
        ("Curves", "\n\n".join(f"![{_words(name)}]({name})" for name in pictures)),
        ("Training", _training(manifest)),
        ("Checks", _checks(manifest)),
        ("Limits", _limits(manifest)),
    )
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text) + "\n"


def _title(m: Manifest) -> str:
    parameters = m.training.get("parameters")
    size = f", {parameters:,} parameters" if parameters else ""
    what = {
        "language-model": "after each symbol it says which one comes next",
        "forecaster": "after each step it says what the next one brings",
        "regressor": "at each step it says what holds there",
        "classifier": "at each step it says which label holds there",
        "multi-label": "at each step it says how likely each label is, each for itself",
    }[m.task]
    int8 = ", int8" if m.quantization == "int8" else ""
    cell = f"{m.layers} layer{'s' if m.layers > 1 else ''} of {m.hidden} {m.cell.upper()} units{int8}"
    return f"# {m.name} {m.version}\n\nA {m.task.replace('-', ' ')} ({cell}{size}): {what}. {_memory(m)}"


def _memory(m: Manifest) -> str:
    if not m.streamable:
        return "It reads whole sequences, from both ends, and keeps no memory."
    if isinstance(m.memory, Window):
        return f"It was trained on windows: its answer is that of the last {m.memory.window} steps."
    return f"Its memory is carried from call to call: {m.state_bytes:,} bytes a session."


def _signature(m: Manifest) -> str:
    if m.sound is not None:
        fed = (
            f"In: sound, {m.sound.hop} samples between -1 and 1 a step, {m.sound.rate:,} a second. Each step is heard "
            f"with a window of {m.sound.window} samples as {m.sound.mels} log-mel bands; those before are its memory."
        )
    elif m.features:
        fed = table(("feature", "unit", "mean", "std", "period"), [_feature_row(feature) for feature in m.features])
    elif m.splitter and m.splitter.kind == "words":
        fed = f"In: words and single punctuation marks, {len(m.symbols)} of them{_lowered(m)}."
    elif m.splitter and m.splitter.kind == "bytes":
        pairs = f", and pairs of them that are one symbol, {len(m.symbols)} symbols in all" if m.splitter.merges else ""
        fed = f"In: text as UTF-8 bytes{pairs}{_lowered(m)}."
    else:
        fed = f"In: text, one symbol a character, {len(m.symbols)} of them{_lowered(m)}."
    return f"{fed}\n\n{_answers(m)}"


def _feature_row(feature: Any) -> Row:  # noqa: ANN401 (service.bundle.Feature)
    return (feature.name, feature.unit, feature.mean, feature.std, feature.period or "")


def _lowered(m: Manifest) -> str:
    return ", in lower case" if m.splitter and m.splitter.lowercase else ""


def _answers(m: Manifest) -> str:
    if m.task in ("classifier", "multi-label"):
        return "Out: a probability for each label: " + ", ".join(m.labels) + "."
    if m.task == "language-model":
        return "Out: a probability for each symbol."
    rows = [(target.name, target.unit, target.std) for target in m.targets]
    ahead = f" {', '.join(map(str, m.horizons))} steps ahead" if m.horizons != (1,) else ""
    quantiles = f" and the quantiles {', '.join(map(str, m.quantiles))}" if m.quantiles else ""
    return f"Out, in the data's own units, the mean{quantiles}{ahead} of:\n\n" + table(("target", "unit", "std"), rows)


def _calls(m: Manifest, example: Json) -> str:
    if m.sound is not None:
        return HEAR.format(name=m.name, base=BASE.removesuffix("/v1"), rate=m.sound.rate, hop=m.sound.hop)
    steps = {"inputs": example, "model": m.name}
    feed = f"# feed a session; the next call goes on from there\n{_curl('/sessions/demo/steps', steps)}"
    lines = [feed] if m.streamable else []
    if m.task == "language-model":
        body = {"inputs": example, "max_tokens": 100, "seed": 1}
        lines.append(f"# no session: write on\n{_curl(f'/models/{m.name}/generate', body)}")
    else:
        body = {"sequences": [example]}
        lines.append(f"# no session: whole sequences\n{_curl(f'/models/{m.name}/predict', body)}")
    if m.task == "forecaster" and m.horizons[0] == 1:
        lines.append(f"# look ahead; the session does not change\n{_curl('/sessions/demo/forecast', _ahead(m))}")
    return "```bash\n" + "\n".join(lines) + "\n```"


def _curl(path: str, body: Json) -> str:
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl -s {BASE}{path} -H 'Content-Type: application/json' -d '{quoted}'"


def _example(m: Manifest) -> Json:
    """Three typical steps; text that the vocabulary can spell."""
    if m.features:
        mean = [_typical(feature.mean, feature.period) for feature in m.features]
        return [mean[0]] * 3 if len(mean) == 1 else [mean] * 3
    if m.splitter and m.splitter.kind == "words":
        return [symbol for symbol in m.symbols if symbol.isalpha()][:3] or list(m.symbols[:3])
    if m.splitter and m.splitter.kind == "bytes":
        return "once upon a time"
    return "".join(symbol for symbol in "once upon a time" if symbol in m.symbols) or m.symbols[0]


def _ahead(m: Manifest) -> Json:
    """Two steps; features that the model does not predict must be told."""
    predicted = {target.name for target in m.targets}
    told = {f.name: _typical(f.mean, f.period) for f in m.features if f.name not in predicted}
    return {"horizon": 2, "future": [told, told]} if told else {"horizon": 6}


def _typical(mean: float, period: float) -> float:
    return float(f"{mean % period if period else mean:.4g}")


def _figures(m: Manifest) -> str:
    if not m.metrics:
        return ""
    note = ["But for those of int8, the figures are those of the float32 weights."] if m.quantization == "int8" else []
    return "\n\n".join([*note, *_blocks("", m.metrics)])


def _blocks(title: str, value: Json) -> list[str]:
    """A JSON object as tables: its numbers in one, each object of objects in one of its own, and so on down."""
    heading = [f"### {_words(title)}"] if title else []
    if _is_grid(value):
        columns = list(dict.fromkeys(key for row in value.values() for key in row))
        rows = [(name, *(row.get(column, "") for column in columns)) for name, row in value.items()]
        return [*heading, table(("", *columns), rows)]
    plain = [(_words(key), item) for key, item in value.items() if not isinstance(item, Mapping)]
    blocks = [table(("figure", ""), plain)] if plain else []
    for key, item in value.items():
        if isinstance(item, Mapping):
            blocks += _blocks(f"{title} {key}".strip(), item)
    return heading + blocks if plain else blocks


def _is_grid(value: Json) -> bool:
    rows = list(value.values())
    nested = [isinstance(row, Mapping) and not any(isinstance(v, Mapping) for v in row.values()) for row in rows]
    return bool(rows) and all(nested)


def table(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table of at most MAX_ROWS rows; numbers to four digits."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows[:MAX_ROWS])]
    more = f"\n\n({len(rows) - MAX_ROWS} more rows in manifest.json)" if len(rows) > MAX_ROWS else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + more


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, Mapping | list):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else "in manifest.json"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _words(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ").replace("-", " ")


def _training(m: Manifest) -> str:
    told = m.training
    rows: list[Row] = [(key, told[key]) for key in ("seed", "steps", "epochs", "minutes") if key in told]
    rows += [(f"data {key}", value) for key, value in told.get("data", {}).items()]
    rows += list(told.get("environment", {}).items())
    command = f"```bash\n{told['command']}\n```\n\n" if told.get("command") else ""
    return command + (table(("", ""), rows) if rows else "")


def _checks(m: Manifest) -> str:
    parity = m.checks.get("parity")
    if not parity:
        return ""
    if not m.streamable:
        return (
            f"The graph agrees with PyTorch over sequences of {', '.join(map(str, m.checks['lengths']))} steps at B = "
            f"{', '.join(map(str, m.checks['batches']))} to {parity['outputs']:.1e} (allowed: {parity['tolerance']:g}; "
            f"ONNX Runtime {m.checks['onnxruntime']}, {m.checks['cpu']})."
        )
    over = "at every step" if m.quantization == "int8" else f"over {len(m.checks['chunks'])} carried chunks"
    return (
        f"The graph agrees with PyTorch {over} at B = "
        f"{', '.join(map(str, m.checks['batches']))} to {parity['outputs']:.1e} in its outputs and "
        f"{parity['states']:.1e} in its states (allowed: {parity['tolerance']:g}; {parity['units']}). Cutting a "
        f"sequence into other chunks, or computing it beside other sessions, changed no bit (ONNX Runtime "
        f"{m.checks['onnxruntime']}, {m.checks['cpu']})."
    )


def _limits(m: Manifest) -> str:
    points = ["It knows what its training data shows and nothing else; see the figures for how far that goes."]
    if m.symbols:
        points.append("A symbol outside its vocabulary is refused (`unknown_symbol`).")
    if m.sound is not None:
        points.append("Another sample rate, microphone or loudness than that of the training data is another sound.")
    elif m.features:
        points.append("Values far outside the means and deviations above were never seen in training.")
    if m.task == "forecaster" and m.horizons == (1,):
        points.append("Figures are for one step ahead; errors grow as a forecast rolls on its own predictions.")
    points.append("The same bits are promised on one build of ONNX Runtime and one kind of CPU.")
    return "\n".join(f"- {point}" for point in points)
