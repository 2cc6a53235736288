"""The model of the benchmarks: fixed sizes and random weights of one seed, published without training."""

from pathlib import Path

import torch

from training.export import export_model
from training.model import ModelConfig, RecurrentModel

SEED = 0
SYMBOLS = ["\n", *map(chr, range(32, 127)), *map(chr, range(161, 193))]
"""128 characters that can be printed."""


def write_reference(folder: Path, int8: bool = False) -> None:
    """Publish `reference`, or `reference-int8`: a language model over 128 characters, a 2-layer lstm of 512 units."""
    torch.manual_seed(SEED)
    config = ModelConfig("language-model", "lstm", layers=2, hidden=512, embedding=256, vocabulary=len(SYMBOLS))
    splitter = {"kind": "characters", "lowercase": False}
    meta = {"input_kind": "text", "symbols": SYMBOLS, "splitter": splitter, "start_symbol": "\n", "seed": SEED}
    export_model(RecurrentModel(config), meta, folder, "reference-int8" if int8 else "reference", int8=int8)
