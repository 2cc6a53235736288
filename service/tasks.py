"""What differs by task: text, symbols and values to entries, and outputs to predictions.

An entry is one input of the network as the log keeps it: a symbol's id (int32), the values of all features
(float32, in the data's own units), or the tensors of a raw model in the graph's own types.
"""

import codecs
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from service import bytepairs
from service.bundle import Feature, Manifest
from service.errors import Problem, invalid
from service.sampling import log_probability, log_softmax
from service.state import Array
from service.tensors import Tensors

Output = dict[str, Array]
"""The graph's outputs at one position, or at consecutive ones: name to [...] or [n, ...]."""

SORTED_WHOLE = 512
"""Symbols: more are not all sorted to find the most likely ones."""
FEW = 16
"""the most likely symbols are found one after another up to that many"""
SHOWN_TOGETHER = 4096
"""numbers of a session's output: of more the predictions are worked out one session after another"""
NAMED = 16
"""features that a refusal names, each of them"""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Alternative(msgspec.Struct, frozen=True, gc=False):
    """A symbol that may come next."""

    token: int
    text: str
    logprob: float


class Codec:
    """Encodes inputs and decodes outputs of one model."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.symbolic = bool(manifest.symbols)
        self._ids = {symbol: i for i, symbol in enumerate(manifest.symbols)}
        self._table = _character_table(manifest) if self.symbolic else None
        splitter = manifest.splitter
        self._texts = [splitter.text(s) for s in manifest.symbols] if splitter is not None else list(manifest.symbols)
        self.in_bytes = splitter is not None and splitter.kind == "bytes"
        """whether a symbol may be a part of a character"""
        self._features = {feature.name: i for i, feature in enumerate(manifest.features)}
        self._target_features = [self._features.get(target.name) for target in manifest.targets]
        self._tensors = Tensors(manifest.inputs) if manifest.input_kind == "tensors" else None
        self.entry_dtype: np.dtype[Any] = np.dtype("<i4") if self.symbolic else np.dtype("<f4")
        self.entry_shape: tuple[int, ...] = () if self.symbolic else (len(manifest.features),)
        if self._tensors is not None:
            self.entry_dtype, self.entry_shape = self._tensors.entry_dtype, self._tensors.entry_shape
        self.shows_together = manifest.output_numbers <= SHOWN_TOGETHER
        """whether the predictions of many sessions are worked out in one"""
        self._next_is_said = manifest.horizons[0] == 1
        quantiles = "quantiles" if manifest.quantiles and self._next_is_said else ""
        judged = {"language-model": "logits", "forecaster": quantiles}
        self.judged = judged.get(manifest.task, "")
        """the output that says how unexpected an entry was, if there is one"""

    # ------------------------------------------------------------------ inputs

    def encode(self, inputs: object, pointer: str = "/inputs") -> Array:
        """Inputs of a request as entries [n] or [n, F]; NaN where a null waits for `fill`."""
        if isinstance(inputs, np.ndarray):
            return self._encode_array(inputs, pointer)
        if self._tensors is not None:
            entries = self._tensors.encode(inputs, pointer)
        else:
            entries = self._encode_symbols(inputs, pointer) if self.symbolic else self._encode_values(inputs, pointer)
        if len(entries) == 0:
            raise invalid("at least one step is needed", pointer)
        return entries

    def single(self, inputs: object) -> int | list[float] | None:
        """The entry that inputs are, as `column` takes it; None where they are not one plain step, or are refused."""
        if self._tensors is not None or not isinstance(inputs, list | str) or len(inputs) != 1:
            return None
        item = inputs[0]
        if not self.symbolic:
            return self._single_row(item) if isinstance(inputs, list) else None
        if isinstance(item, str):
            return self._ids.get(item) if isinstance(inputs, list) or self._table is not None else None
        return item if type(item) is int and 0 <= item < len(self.manifest.symbols) else None

    def _single_row(self, item: object) -> list[float] | None:
        try:
            return self._row(item, "")
        except Problem:
            return None

    def column(self, singles: Sequence[int | list[float]]) -> Array:
        """Entries of as many steps, [n] or [n, F]."""
        return np.array(singles, self.entry_dtype)

    def _encode_array(self, array: Array, pointer: str) -> Array:
        """Entries that come as an array already: at least one, of their shape, and numbers that the model knows."""
        if self.entry_dtype.names is not None:
            raise invalid("the model has several inputs: feed it by /v1/sessions, which takes them by name", pointer)
        if array.shape[1:] != self.entry_shape or not len(array):
            raise invalid(f"steps have the shape {list(self.entry_shape)}, and at least one is needed", pointer)
        if self.symbolic:
            odd = np.flatnonzero((array < 0) | (array >= len(self.manifest.symbols)))
            if len(odd):
                detail = f"id {array[odd[0]]} (number {odd[0]}, from 0) is not in 0..{len(self.manifest.symbols) - 1}"
                raise Problem("unknown_symbol", detail, pointer, index=int(odd[0]))
            return array.astype(self.entry_dtype)
        with np.errstate(over="ignore"):  # what does not fit is found as infinite
            entries = array.astype(self.entry_dtype)
        if not np.isfinite(entries).all():
            raise invalid(f"every value must be finite and fit {self.entry_dtype.name}", pointer)
        return entries

    def _encode_symbols(self, inputs: object, pointer: str) -> Array:
        if isinstance(inputs, str) and self._table is not None:
            codes = np.frombuffer(inputs.encode("utf-32-le", "surrogatepass"), "<u4")
            entries = self._table[np.minimum(codes, len(self._table) - 1)]
            if (entries >= 0).all():
                return np.asarray(entries)
        if isinstance(inputs, str):
            splitter = self.manifest.splitter
            items: Sequence[object] = splitter.split(inputs) if splitter is not None else list(inputs)
            listed = False
        elif isinstance(inputs, list):
            items, listed = inputs, True
        else:
            raise invalid("a string or a list of symbols is needed", pointer)
        known = [item for item in items if type(item) is int and 0 <= item < len(self.manifest.symbols)]
        if len(known) < len(items):  # symbols by name, or something that is wrong
            where = pointer if not listed else None
            known = [self._id(item, i, where or f"{pointer}/{i}") for i, item in enumerate(items)]
        return np.array(known, self.entry_dtype)

    def _id(self, item: object, index: int, pointer: str) -> int:
        if isinstance(item, str):
            found = self._ids.get(item)
            if found is None:
                raise Problem(
                    "unknown_symbol",
                    f"symbol {item[:64]!r} (number {index}, from 0) is not in the vocabulary of {self.manifest.name}",
                    pointer,
                    symbol=item[:64],
                    index=index,
                )
            return found
        if isinstance(item, int) and not isinstance(item, bool):
            if 0 <= item < len(self.manifest.symbols):
                return item
            detail = f"id {str(item)[:32]} (number {index}, from 0) is not in 0..{len(self.manifest.symbols) - 1}"
            raise Problem("unknown_symbol", detail, pointer, index=index)
        raise invalid("a symbol is a string or an id", pointer)

    def _encode_values(self, inputs: object, pointer: str) -> Array:
        if not isinstance(inputs, list):
            raise invalid("a list of steps is needed, each with the values of all features", pointer)
        rows = [self._row(item, f"{pointer}/{i}") for i, item in enumerate(inputs)]
        return np.array(rows, "<f4").reshape(len(rows), len(self.manifest.features))

    def _row(self, item: object, pointer: str) -> list[float]:
        features = self.manifest.features
        if isinstance(item, dict):
            return self._row_of_names(item, pointer)
        if not isinstance(item, list):
            if len(features) != 1:
                raise invalid(f"a step is a list of {len(features)} values: {self._names()}", pointer)
            return [_value(features[0], item, pointer)]
        if len(item) != len(features):
            raise invalid(f"{len(item)} values where {len(features)} are needed: {self._names()}", pointer)
        return [_value(f, v, f"{pointer}/{i}") for i, (f, v) in enumerate(zip(features, item, strict=True))]

    def _names(self) -> str:
        """The features, of many the first and the last."""
        names = list(self._features)
        return ", ".join(names if len(names) <= NAMED else [names[0], "...", names[-1]])

    def _row_of_names(self, item: Mapping[str, object], pointer: str) -> list[float]:
        unknown = [name for name in item if name not in self._features]
        missing = [name for name in self._features if name not in item]
        if unknown or missing:
            said = [f"unknown: {str(unknown[:5])[1:-1]}"] if unknown else []
            said += [f"missing: {str(missing)[1:-1]}"] if missing else []
            raise invalid(f"feature names do not fit ({'; '.join(said)})", pointer)
        return [_value(f, item[f.name], f"{pointer}/{f.name}") for f in self.manifest.features]

    def fill(self, entries: Array, before: Array | None) -> Array:
        """Put the value of the step before (else the training mean) where a null was; `before`: [F] or None."""
        if not self.manifest.features or not np.isnan(entries).any():
            return entries
        filled = entries.copy()
        last = before if before is not None else np.array([f.mean for f in self.manifest.features], "<f4")
        for row in filled:
            np.copyto(row, last, where=np.isnan(row))
            last = row
        return filled

    def gaps(self, entries: Array) -> list[bool]:
        """Where there is something to `fill`, one an entry."""
        if not self.manifest.features:
            return [False] * len(entries)
        return [bool(np.isnan(entry).any()) for entry in entries]

    def start(self) -> Array:
        """The start symbol as entries [1]; raises `empty_session` when the model has none."""
        if self.manifest.start_symbol is None:
            raise Problem("empty_session", "the session is empty and the model has no start symbol: give inputs")
        return np.array([self._ids[self.manifest.start_symbol]], "<i4")

    def none(self) -> Array:
        """No entries: shape [0] or [0, F]."""
        return np.empty((0, *self.entry_shape), self.entry_dtype)

    def entries(self, data: bytes) -> Array:
        """Entries from the log's bytes, [n] or [n, F]; inverse of `tobytes()`."""
        return np.frombuffer(data, self.entry_dtype).reshape(-1, *self.entry_shape)

    def decode(self, entries: Array) -> list[Any]:
        """Entries as they can be fed again: symbols, a list of values a step, or tensors."""
        if self._tensors is not None:
            return self._tensors.decode(entries)
        if self.symbolic:
            return [self.manifest.symbols[i] for i in entries.tolist()]
        return list(entries.tolist())

    def text(self, symbol: int) -> str:
        """A symbol as people read it."""
        return self._texts[symbol]

    def texts(self, symbols: Sequence[int]) -> list[str]:
        """The same of each of many."""
        texts = self._texts
        return [texts[symbol] for symbol in symbols]

    # ------------------------------------------------------------------ outputs

    def predictions(
        self, outputs: Output, first: int, before: Output | None, entries: Array, alternatives: int
    ) -> list[dict[str, Any]]:
        """Predictions at positions `first`, first + 1, ... for `outputs` [n, ...] over `entries` [n, ...].

        `before` is the output at position first - 1: what the surprise of the first entry is measured against.
        """
        expected = _shifted(outputs[self.judged], before[self.judged] if before else None) if self.judged else None
        return self._predictions(outputs, expected, entries, range(first, first + len(entries)), alternatives)

    def newest(
        self, outputs: Output, positions: Sequence[int], before: Output, entries: Array, alternatives: int
    ) -> list[dict[str, Any]]:
        """The same for one position of each of many sessions; `before` [n, ...] is NaN where nothing was predicted."""
        return self._predictions(outputs, before.get(self.judged), entries, positions, alternatives)

    def _predictions(
        self, outputs: Output, expected: Array | None, entries: Array, positions: Iterable[int], alternatives: int
    ) -> list[dict[str, Any]]:
        shown = self._shown(outputs, alternatives)
        for prediction, position in zip(shown, positions, strict=True):
            prediction["position"] = position
        surprise = self._surprise(expected, entries) if expected is not None else None
        if surprise is not None:
            for prediction, one in zip(shown, surprise.tolist(), strict=True):
                if not math.isnan(one):
                    prediction["surprise"] = one
        return shown

    def _shown(self, outputs: Output, alternatives: int) -> list[dict[str, Any]]:
        match self.manifest.task:
            case "language-model":
                return [{"alternatives": row} for row in self._alternatives(outputs["logits"], alternatives)]
            case "classifier":
                given = outputs.get("probabilities")
                probabilities = given if given is not None else np.exp(log_softmax(outputs["logits"]))
                return [self._classified(row) for row in probabilities]
            case "multi-label":
                chances = 1 / (1 + np.exp(-np.clip(outputs["logits"].astype(np.float64), -700, 700)))
                return [
                    {"probabilities": dict(zip(self.manifest.labels, row, strict=True))} for row in chances.tolist()
                ]
            case "raw":
                listed = {name: array.tolist() for name, array in outputs.items()}
                return [{"outputs": dict(zip(listed, row, strict=True))} for row in zip(*listed.values(), strict=True)]
            case _:
                return [self._forecast(outputs, i) for i in range(len(outputs["mean"]))]

    def alternatives(self, logits: Array, count: int) -> list[Alternative]:
        """The `count` most likely symbols for `logits` [V], most likely first."""
        return self._alternatives(logits[None], count)[0]

    def _alternatives(self, logits: Array, count: int) -> list[list[Alternative]]:
        logprobs = log_softmax(logits)
        order = _most_likely(logprobs, count)
        likely = logprobs[np.arange(len(order))[:, None], order]
        rows, width = order.shape
        ids = order.ravel().tolist()
        shown = list(map(Alternative, ids, self.texts(ids), likely.ravel().tolist()))
        return [shown[i * width : (i + 1) * width] for i in range(rows)]

    def _classified(self, probabilities: Array) -> dict[str, Any]:
        labels = self.manifest.labels
        return {
            "label": labels[int(probabilities.argmax())],
            "probabilities": dict(zip(labels, probabilities.tolist(), strict=True)),
        }

    def _forecast(self, outputs: Output, i: int) -> dict[str, Any]:
        horizons, K = self.manifest.horizons, len(self.manifest.targets)
        if horizons == (1,):
            return self._values(outputs, i)
        parts = (
            {name: array[..., j * K : (j + 1) * K] for name, array in outputs.items()} for j in range(len(horizons))
        )
        return {"horizons": {str(h): self._values(part, i) for h, part in zip(horizons, parts, strict=True)}}

    def _values(self, outputs: Output, i: int) -> dict[str, Any]:
        names = [target.name for target in self.manifest.targets]
        shown: dict[str, Any] = {"mean": dict(zip(names, outputs["mean"][i].tolist(), strict=True))}
        if self.manifest.quantiles:
            shown["quantiles"] = {
                str(q): dict(zip(names, row.tolist(), strict=True))
                for q, row in zip(self.manifest.quantiles, outputs["quantiles"][i], strict=True)
            }
        return shown

    def forecast(self, output: Output) -> dict[str, Any]:
        """One step of a forecast for the outputs at one position."""
        return self._values({name: array[None] for name, array in output.items()}, 0)

    def one_ahead(self, output: Output) -> Output:
        """What the outputs at one position say of the next step alone: what a forecast feeds back."""
        if not self._next_is_said:
            said = ", ".join(map(str, self.manifest.horizons))
            detail = f"{self.manifest.name} says only what comes {said} steps ahead, which the answer to steps holds"
            raise Problem("task_mismatch", detail)
        return {name: array[..., : len(self.manifest.targets)] for name, array in output.items()}

    def _surprise(self, expected: Array, entries: Array) -> Array | None:
        """How unexpected each entry was, [n] float64; NaN where nothing was predicted."""
        if self.manifest.task == "language-model":
            return -log_probability(expected, entries)
        return self._pinball(expected, entries)

    def _pinball(self, quantiles: Array, entries: Array) -> Array | None:
        """Mean pinball loss in training standard deviations: `quantiles` [n, Q, K], `entries` [n, F] -> [n]."""
        pairs = [(k, f) for k, f in enumerate(self._target_features) if f is not None]
        if not pairs:
            return None
        k, f = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        std = np.array([self.manifest.targets[i].std for i in k])
        error = (entries[:, None, f].astype(np.float64) - quantiles[:, :, k]) / std
        levels = np.array(self.manifest.quantiles)[None, :, None]
        losses = np.maximum(levels * error, (levels - 1) * error).reshape(len(entries), -1)
        # Summed over one contiguous axis: over two, the order depends on how many rows there are.
        return np.asarray(np.ascontiguousarray(losses).mean(axis=1))

    def next_entry(self, values: Array, future: Mapping[str, float]) -> Array:
        """The next input of a forecast: predicted targets `values` [K] and given features -> [F]."""
        entry = np.empty(len(self.manifest.features), "<f4")
        for k, f in enumerate(self._target_features):
            if f is not None:
                entry[f] = values[k]
        for name, value in future.items():
            entry[self._features[name]] = value
        return entry

    def given_features(self) -> list[str]:
        """The features that the model does not predict: a forecast needs them from its caller."""
        predicted = {target.name for target in self.manifest.targets}
        return [feature.name for feature in self.manifest.features if feature.name not in predicted]

    def future(self, rows: Sequence[Mapping[str, object]] | None, horizon: int) -> list[dict[str, float]]:
        """What a forecast is told of the steps to come: one dict a step that is fed back (horizon - 1)."""
        given = self.given_features()
        by_name = {feature.name: feature for feature in self.manifest.features}
        rows = rows or []
        if given and len(rows) < horizon - 1:
            raise invalid(f"{horizon - 1} steps of {', '.join(given)} are needed, {len(rows)} given", "/future")
        told = []
        for i, row in enumerate(rows[: horizon - 1]):
            missing = [name for name in given if row.get(name) is None]
            unknown = [name for name in row if name not in by_name]
            if missing or unknown:
                raise invalid(f"missing: {missing}, unknown: {unknown[:5]}", f"/future/{i}")
            told.append({n: _value(by_name[n], v, f"/future/{i}/{n}") for n, v in row.items() if v is not None})
        return told + [{} for _ in range(horizon - 1 - len(told))]


def _character_table(manifest: Manifest) -> Array | None:
    """Code point to id, -1 where there is none; None when symbols are not single characters."""
    splitter = manifest.splitter
    plain = splitter is not None and splitter.kind == "characters" and not splitter.lowercase
    if not plain or any(len(symbol) != 1 for symbol in manifest.symbols):
        return None
    table = np.full(max(map(ord, manifest.symbols)) + 2, -1, "<i4")
    table[[ord(symbol) for symbol in manifest.symbols]] = np.arange(len(manifest.symbols))
    return table


def _most_likely(logprobs: Array, count: int) -> Array:
    """Ids of the `count` greatest of each row of [n, V], greatest first, equal ones by id."""
    if count <= FEW and logprobs.size > SORTED_WHOLE:
        return _greatest(logprobs.copy(), count)
    if logprobs.shape[1] <= SORTED_WHOLE:
        return np.asarray(np.argsort(-logprobs, axis=1, kind="stable")[:, :count])
    count = min(count, logprobs.shape[1])
    found = np.empty((len(logprobs), count), np.int64)
    for i, row in enumerate(logprobs):
        least = np.partition(row, -count)[-count] if count else np.inf
        likely = np.flatnonzero(row >= least)
        found[i] = likely[np.argsort(-row[likely], kind="stable")][:count]
    return found


def _greatest(logprobs: Array, count: int) -> Array:
    """The same, one after another: the first of equal ones is taken; `logprobs` is used up."""
    found, rows = np.empty((len(logprobs), min(count, logprobs.shape[1])), np.int64), np.arange(len(logprobs))
    for i in range(found.shape[1]):
        found[:, i] = logprobs.argmax(axis=1)
        logprobs[rows, found[:, i]] = -np.inf
    return found


def _shifted(output: Array, before: Array | None) -> Array:
    """What was predicted of each position: the outputs moved by one, NaN where there was none."""
    first = before[None] if before is not None else np.full_like(output[:1], np.nan)
    return np.concatenate([first, output[:-1]])


def _value(feature: Feature, value: object, pointer: str) -> float:
    if value is None:
        if feature.fill is None:
            raise invalid(f"feature {feature.name!r} is null and has no fill rule", pointer)
        return feature.mean if feature.fill == "mean" else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"feature {feature.name!r} must be a number", pointer)
    if not abs(value) <= _FLOAT32_MAX:
        raise invalid(f"feature {feature.name!r} must be finite and fit a 32-bit float", pointer)
    return float(value)


class TextStream:
    """Text of a generate, a piece a token; holds back what may turn out to be a stop string."""

    def __init__(self, codec: Codec, stop: Sequence[str]) -> None:
        self._codec = codec
        self._stop = stop
        self._separator = codec.manifest.splitter.separator if codec.manifest.splitter else ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if codec.in_bytes else None
        self._begun = False
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(the text that is certain now, whether a stop string ended it)."""
        self._held += self._piece(token)
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def extend(self, tokens: Sequence[int]) -> tuple[list[str], bool]:
        """What `push` gives for each, up to the one at which a stop string ended it."""
        if not self._stop:
            return self._pieces(tokens), False
        texts = []
        for token in tokens:
            text, stopped = self.push(token)
            texts.append(text)
            if stopped:
                return texts, True
        return texts, False

    def flush(self) -> str:
        """The text still held back, once no token can follow."""
        text, self._held = self._held, ""
        return text + (self._decoder.decode(b"", final=True) if self._decoder is not None else "")

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        if self._decoder is not None or self._separator:
            return [self._piece(token) for token in tokens]
        return self._codec.texts(tokens)

    def _piece(self, token: int) -> str:
        """A token's own text: nothing while a character is not whole."""
        if self._decoder is not None:
            return self._decoder.decode(bytepairs.to_bytes(self._codec.manifest.symbols[token]))
        gap, self._begun = (self._separator if self._begun else ""), True
        return gap + self._codec.text(token)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
