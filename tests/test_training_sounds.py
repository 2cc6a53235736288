"""Recordings as data: what a folder says, how WAV is read, what is heard, and what can not be used."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training_rubbish import refused, train
from wav import RATE, chirp, chirps, write

from service.bundle import Sound
from training import parity
from training.config import DataRecipe
from training.data import DataError
from training.graph import build
from training.mel import FLOOR, SoundEncoder
from training.model import ModelConfig, RecurrentModel
from training.sounds import folder, read_wav

SOUND = Sound(rate=RATE, hop=80, window=200, mels=24)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_any_width_is_read(width: int, channels: int, tmp_path: Path) -> None:
    told = [0.0, 0.5, -0.5, 0.25, -1.0, 0.9]
    samples, rate = read_wav(write(tmp_path / "a.wav", told, width=width, channels=channels))
    assert rate == RATE and samples.dtype == np.float32
    assert samples.tolist() == pytest.approx(told, abs=max(1.01 / 2 ** (8 * width - 1), 1e-7))


def test_channels_are_mixed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", [0.5, 0.0, 0.25, -0.25])
    raw = path.read_bytes()
    path.write_bytes(raw[:22] + b"\x02\x00" + raw[24:32] + b"\x04\x00" + raw[34:])  # as two frames of two channels
    assert read_wav(path)[0].tolist() == [0.25, 0.0]


def test_sub_folders_are_labels_and_every_label_is_in_every_part(tmp_path: Path) -> None:
    chirps(tmp_path / "birds", each=10)
    (tmp_path / "birds" / "rising" / "notes.txt").write_text("no recording")
    corpus = folder(tmp_path / "birds", DataRecipe())
    assert corpus.labels == ["falling", "rising", "steady"]
    parts = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    assert {name: len(part) for name, part in parts.items()} == {"train": 21, "validation": 3, "test": 6}
    for part in parts.values():
        assert {corpus.labels[int(one.targets[0])] for one in part} == set(corpus.labels)
        assert all(one.name.startswith(corpus.labels[int(one.targets[0])]) for one in part)
    names = [one.name for part in parts.values() for one in part]
    assert len(set(names)) == 30
    assert folder(tmp_path / "birds", DataRecipe()).sha256 == corpus.sha256
    write(tmp_path / "birds" / "rising" / "0.wav", [0.1] * 2000)
    assert folder(tmp_path / "birds", DataRecipe()).sha256 != corpus.sha256


def test_the_last_hop_is_filled_up_with_silence(tmp_path: Path) -> None:
    chirps(tmp_path, each=3)
    write(tmp_path / "steady" / "0.wav", [0.5] * 90)
    corpus = folder(tmp_path, DataRecipe())
    (short,) = [s for s in (*corpus.train, *corpus.validation, *corpus.test) if s.name == "steady/0.wav"]
    assert short.inputs.shape == (2, 80)
    assert short.inputs[1].tolist() == [0.5] * 10 + [0.0] * 70


def test_labels_csv_says_labels_and_parts(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = ["file,label,part"]
    for i, part in enumerate(["train", "train", "validation", "validation", "test", "test"]):
        label = ("rising", "falling")[i % 2]
        write(tmp_path / "all" / f"{i}.WAV", chirp(label, rng))
        rows.append(f"all/{i}.WAV,{label},{part}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    corpus = folder(tmp_path, DataRecipe())
    assert [one.name for one in corpus.test] == ["all/4.WAV", "all/5.WAV"]
    assert [corpus.labels[int(one.targets[0])] for one in corpus.test] == ["rising", "falling"]


def reference(sound: np.ndarray, mels: SoundEncoder) -> np.ndarray:
    """Frame by frame in float64, with numpy's own Fourier transform."""
    overlap = SOUND.window - SOUND.hop
    line = np.concatenate((np.zeros(overlap), sound.astype(np.float64)))
    window = np.hanning(SOUND.window + 2)[1:-1]
    bands = mels.bands[: len(mels.bands) // 2].double().numpy()
    frames = [line[at : at + SOUND.window] for at in range(0, len(sound), SOUND.hop)]
    power = [np.abs(np.fft.rfft(frame * window * 2 / window.sum(), 256)) ** 2 @ bands for frame in frames]
    return np.log(np.array(power) + FLOOR)


def test_what_is_heard_is_the_log_mel_spectrum_however_it_is_cut() -> None:
    encoder = SoundEncoder(SOUND)
    sound = np.array(chirp("rising", random.Random(2))[:1600], np.float32)
    samples, state = torch.from_numpy(sound).reshape(20, 1, 80), torch.zeros(1, 1, 120)
    whole, after = encoder(samples, state)
    assert np.abs(whole[:, 0].numpy() - reference(sound, encoder)).max() < 1e-3
    parts = []
    for piece in samples.split([1, 2, 7, 10]):
        heard, state = encoder(piece, state)
        parts.append(heard)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)
    assert torch.equal(state, after) and torch.equal(after[0, 0], torch.from_numpy(sound[-120:]))


def test_a_sine_of_full_scale_has_a_power_of_about_one_in_its_band() -> None:
    encoder = SoundEncoder(SOUND)
    sine = torch.sin(2 * torch.pi * 1000 / RATE * torch.arange(1600)).reshape(20, 1, 80)
    heard, _ = encoder(sine, torch.zeros(1, 1, 120))
    assert -1.0 < float(heard[5, 0].max()) < 1.0
    silence, _ = encoder(torch.zeros(4, 1, 80), torch.zeros(1, 1, 120))
    assert torch.allclose(silence, torch.tensor(FLOOR).log())


def test_the_scales_are_those_of_the_sounds() -> None:
    encoder = SoundEncoder(SOUND)
    sounds = [torch.randn(9, 80) * 0.1, torch.randn(30, 80) * 0.01]
    encoder.fit(sounds)
    heard = torch.cat([encoder(sound[:, None], torch.zeros(1, 1, 120))[0][:, 0] for sound in sounds])
    assert torch.allclose(heard.mean(dim=0), torch.zeros(24), atol=1e-3)
    assert torch.allclose(heard.std(dim=0, unbiased=False), torch.ones(24), atol=1e-3)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_graph_hears_the_same_from_silence_to_full_scale(cell: str) -> None:
    """Parity over carried chunks; neither cuts nor company change a bit (parity.check raises otherwise)."""
    torch.manual_seed(1)
    config = ModelConfig("classifier", cell, 2, 16, periods=(0.0,) * 80, labels=3, sound=SOUND)
    module = RecurrentModel(config).eval()
    assert isinstance(module.encoder, SoundEncoder)
    module.encoder.fit([torch.randn(40, 80) * 0.1])
    graph = build(module).SerializeToString()
    checks = parity.check(module, graph)
    assert checks["chunk_invariant"] and checks["batch_invariant"] and checks["parity"]["states"] < 1e-4
    entries = parity.plausible_entries(module, 6, 3)
    _, states = parity.ort_step(graph)(entries, parity.zero_states(module, 3))
    assert states["samples"].shape == (1, 3, 120)
    assert (states["samples"][0] == np.concatenate((entries[-2], entries[-1]), axis=1)[:, -120:]).all()


WIDE = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0@\x1f\0\0\0\xfa\0\0\x08\0@\0data\x08\0\0\0" + bytes(8)

BROKEN = {
    "no WAV": (lambda path: path.write_bytes(b"ID3 an mp3"), "ffmpeg -i bad.wav -c:a pcm_s16le"),
    "nothing in it": (lambda path: path.write_bytes(b""), "can not be read as WAV (it ends too soon)"),
    "64 bits": (lambda path: path.write_bytes(WIDE), "can not be read as WAV (64 bits a sample)"),
    "no sound": (lambda path: write(path, []), "holds no sound: leave it out"),
    "another rate": (lambda path: write(path, [0.1] * 900, rate=16000), "ffmpeg -i rising.wav -ar 8000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_recording_that_can_not_be_used(case: str, tmp_path: Path) -> None:
    make, said = BROKEN[case]
    birds = chirps(tmp_path / "birds", each=3)
    name = "rising.wav" if case == "another rate" else "bad.wav"
    make(birds / "rising" / name)
    assert said in refused(train(tmp_path, birds))


def test_a_recording_that_is_cut_off(tmp_path: Path) -> None:
    birds = chirps(tmp_path / "birds", each=3)
    path = birds / "rising" / "0.wav"
    path.write_bytes(path.read_bytes()[:1000])
    assert "is cut off: 956 bytes of" in refused(train(tmp_path, birds))


def test_folders_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "put the WAV files of each label into a folder" in refused(train(tmp_path, tmp_path / "empty"))
    for i in range(4):
        write(tmp_path / "one" / "rising" / f"{i}.wav", [0.1] * 900)
    assert "one label, 'rising': a classifier needs two" in refused(train(tmp_path, tmp_path / "one"))
    write(tmp_path / "one" / "steady" / "0.wav", [0.1] * 900)
    assert "1 recordings of 'steady' are too few" in refused(train(tmp_path, tmp_path / "one"))
    birds = chirps(tmp_path / "birds", each=3)
    assert "lower data.mels" in refused(train(tmp_path, birds, "--set", "data.mels=200"))
    assert "a window more than a hop" in refused(train(tmp_path, birds, "--set", "data.hop_ms=30"))
    assert "task = classifier" in refused(train(tmp_path, birds, "--recipe", "text"))
    assert "give one of WAV files with --data" in refused(train(tmp_path, tmp_path / "none", "--recipe", "sounds"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name,kind\na.wav,b\n", "needs the columns file and label"),
        ("file,label\n", "needs the columns file and label"),
        ("file,label\nrising/0.wav,\n", "row 2 needs a label"),
        ("file,label\nnone.wav,a\n", "names 'none.wav', which is no file"),
        ("file,label\n../outside.wav,a\n", "which is no file in that folder"),
        ("file,label,part\nrising/0.wav,a,train\nrising/1.wav,b,learn\n", "train, validation, test"),
        ("file,label,part\nrising/0.wav,a,train\nrising/1.wav,b,test\n", "deals nothing to validation"),
    ],
)
def test_a_labels_csv_that_can_not_be_used(content: str, said: str, tmp_path: Path) -> None:
    birds = chirps(tmp_path / "birds", each=3)
    write(tmp_path / "outside.wav", [0.1] * 900)
    (birds / "labels.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        folder(birds, DataRecipe())
