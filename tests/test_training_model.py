import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.model import CELLS, ForecastHead, ModelConfig, RecurrentModel, ValueEncoder, state_names


def forecaster(**changes: object) -> ModelConfig:
    shape: dict[str, object] = {
        "task": "forecaster", "cell": "lstm", "layers": 2, "hidden": 8, "periods": (0.0, 24.0, 0.0), "targets": (0, 2),
        "quantiles": (0.1, 0.5, 0.9),
    }  # fmt: skip
    return ModelConfig(**{**shape, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_of_symbols_and_states(cell: str) -> None:
    model = RecurrentModel(ModelConfig("language-model", cell, 2, 8, embedding=4, vocabulary=5))
    state = model.initial_state(3)
    outputs, after = model(torch.randint(5, (7, 3)), state)
    assert outputs["logits"].shape == (7, 3, 5)
    assert len(after) == len(state_names(cell))
    assert all(tensor.shape == (2, 3, 8) for tensor in after)


@pytest.mark.parametrize("cell", CELLS)
def test_chunks_with_the_state_carried_equal_one_call(cell: str) -> None:
    torch.manual_seed(0)
    model = RecurrentModel(ModelConfig("classifier", cell, 2, 8, embedding=4, vocabulary=5, labels=3)).eval()
    inputs = torch.randint(5, (20, 2))
    whole, _ = model(inputs, model.initial_state(2))
    state, parts = model.initial_state(2), []
    for chunk in inputs.split([1, 7, 12]):
        outputs, state = model(chunk, state)
        parts.append(outputs["logits"])
    torch.testing.assert_close(torch.cat(parts), whole["logits"], atol=1e-6, rtol=0)


def test_a_forecast_is_in_the_datas_units() -> None:
    model = RecurrentModel(forecaster())
    outputs, _ = model(torch.zeros(4, 2, 3), model.initial_state(2))
    assert outputs["mean"].shape == (4, 2, 2)
    assert outputs["quantiles"].shape == (4, 2, 3, 2)
    assert isinstance(model.head, ForecastHead)
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.zero_()
        model.head.target_mean.copy_(torch.tensor([15.0, 1013.0]))
    outputs, _ = model(torch.zeros(4, 2, 3), model.initial_state(2))
    torch.testing.assert_close(outputs["mean"][0, 0], torch.tensor([15.0, 1013.0]))


def test_a_residual_model_that_learnt_nothing_is_persistence() -> None:
    model = RecurrentModel(forecaster(residual=True))
    with torch.no_grad():
        for parameter in model.head.linear.parameters():
            parameter.zero_()
    inputs = torch.randn(4, 2, 3)
    outputs, _ = model(inputs, model.initial_state(2))
    torch.testing.assert_close(outputs["mean"], inputs[..., [0, 2]])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), size=st.floats(0.1, 1e4), residual=st.booleans())
def test_quantiles_never_cross(seed: int, size: float, residual: bool) -> None:
    torch.manual_seed(seed)
    model = RecurrentModel(forecaster(residual=residual))
    with torch.no_grad():
        model.head.linear.weight.mul_(size)
    outputs, _ = model(torch.randn(5, 3, 3) * size, model.initial_state(3))
    assert (outputs["quantiles"].diff(dim=2) >= 0).all()


def test_the_encoder_puts_plain_features_first_and_closes_the_circle() -> None:
    encoder = ValueEncoder((0.0, 24.0, 0.0))
    encoder.mean.copy_(torch.tensor([10.0, 0.0, 2.0]))
    encoder.scale.copy_(torch.tensor([5.0, 1.0, 4.0]))
    row = torch.tensor([[[20.0, 6.0, 6.0]]])
    torch.testing.assert_close(encoder(row)[0, 0], torch.tensor([2.0, 1.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder(row), encoder(row + torch.tensor([0.0, 24.0, 0.0])), atol=1e-5, rtol=0)


def test_the_config_survives_json() -> None:
    config = forecaster()
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    "changes", [{"cell": "lstn"}, {"task": "regress"}, {"layers": 0}, {"quantiles": (0.9, 0.1)}, {"quantiles": (0.0,)}]
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"model\."):
        forecaster(**changes)


def test_the_forget_gate_begins_open() -> None:
    model = RecurrentModel(ModelConfig("language-model", "lstm", 1, 8, embedding=4, vocabulary=5))
    both = model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0
    assert (both[8:16] == 1).all()
    block = model.rnn.weight_hh_l0[:8]
    torch.testing.assert_close(block @ block.T, torch.eye(8), atol=1e-5, rtol=0)
