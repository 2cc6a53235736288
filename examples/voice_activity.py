"""Who is speaking when: a recording, or the microphone, heard by the Silero VAD network with its memory in a session.

The model is not shipped; it comes with the package `silero-vad`, is MIT-licensed, and is added once:

    pip install --no-deps silero-vad
    recurra add .venv/lib/python3*/site-packages/silero_vad/data/silero_vad.onnx --name silero-vad \\
      --set constants.sr=16000 --set sizes.input.1=512 --set context.input=64
    curl -X POST http://127.0.0.1:8000/v1/models/reload

It is a raw model: a step is 512 samples (32 ms at 16 kHz, between -1 and 1), and the answer is the probability of
speech.

    python examples/voice_activity.py recording.wav       # 16 kHz, mono, 16 bit
    python examples/voice_activity.py                      # the microphone: pip install sounddevice
"""

import argparse
import importlib
import wave
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from recurra_client import Client, Session

RATE = 16_000
CHUNK = 512
SPEECH, SILENCE = 0.5, 0.35
"""speech begins above the one and ends below the other"""
PAUSE = 6
"""chunks of silence that end it"""
TOGETHER = 31
"""chunks of a recording in one request: a second"""


def recording(path: str) -> Iterator[list[float]]:
    """The chunks of a WAV file, the last one filled up with silence."""
    with wave.open(path, "rb") as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise SystemExit(f"{path} must be {RATE} Hz, mono, 16 bit: ffmpeg -i {path} -ar {RATE} -ac 1 new.wav")
        while frames := file.readframes(CHUNK):
            yield samples(frames)


def microphone() -> Iterator[list[float]]:
    """Chunks as they are heard, until Ctrl-C."""
    try:
        sounddevice: Any = importlib.import_module("sounddevice")
    except (ImportError, OSError) as error:
        raise SystemExit(f"the microphone needs pip install sounddevice ({error}); or give a WAV file") from error
    with sounddevice.RawInputStream(samplerate=RATE, channels=1, dtype="int16", blocksize=CHUNK) as heard:
        while True:
            frames, _ = heard.read(CHUNK)
            yield samples(bytes(frames))


def samples(frames: bytes) -> list[float]:
    """16-bit samples as numbers between -1 and 1."""
    whole = array("h", frames)
    return [one / 32768 for one in whole] + [0.0] * (CHUNK - len(whole))


def probabilities(session: Session, chunks: Iterator[list[float]], together: int) -> Iterator[float]:
    """The probability of speech in each chunk; the network remembers those before."""
    while part := list(islice(chunks, together)):
        for prediction in session.steps({"input": part}, predictions="all").predictions:
            outputs = prediction.outputs or {}
            yield number(outputs.get("output", next(iter(outputs.values()), None)))


def number(nested: Any) -> float:  # noqa: ANN401 (a nested list, of a shape that is the model's own)
    """The first number of a nested list."""
    while isinstance(nested, list):
        nested = nested[0]
    return float(nested)


def speech(heard: Iterable[float]) -> Iterator[tuple[float, float]]:
    """Beginning and end in s of each stretch of speech, once it has ended."""
    begin, silent, i = -1, 0, -1
    for i, probability in enumerate(heard):
        if probability >= SPEECH:
            begin, silent = begin if begin >= 0 else i, 0
        elif begin >= 0 and probability < SILENCE:
            silent += 1
            if silent == PAUSE:
                yield begin * CHUNK / RATE, (i + 1 - PAUSE) * CHUNK / RATE
                begin, silent = -1, 0
    if begin >= 0:
        yield begin * CHUNK / RATE, (i + 1 - silent) * CHUNK / RATE


def main() -> None:
    """Print when somebody speaks."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("wav", nargs="?", help="a recording; without one the microphone is listened to")
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--model", default="silero-vad")
    chosen = options.parse_args()

    chunks = recording(chosen.wav) if chosen.wav else microphone()
    together = TOGETHER if chosen.wav else 1
    with Client(chosen.url) as client, client.session(model=chosen.model) as ear:
        try:
            for begin, end in speech(probabilities(ear, chunks, together)):
                print(f"{begin:8.2f} s to {end:8.2f} s", flush=True)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
