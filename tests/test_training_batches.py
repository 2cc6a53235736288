import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batches import Batch, StreamSet, WindowSet, shares
from training.data import DataError, Sequence
from training.evaluate import fresh_state, losses, streamed
from training.model import ModelConfig, RecurrentModel


def counting(name: str, length: int, first: int = 0) -> Sequence:
    ids = torch.arange(first, first + length)
    return Sequence(name, ids, ids + 1, torch.ones(length))


def rows(batches: list[Batch]) -> list[list[int]]:
    """What each row reads over all batches, without padding."""
    read: list[list[int]] = [[] for _ in batches[0].spans]
    for batch in batches:
        for row, (_, start, stop) in enumerate(batch.spans):
            read[row] += batch.inputs[: stop - start, row].tolist()
    return read


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=8), extra=st.integers(0, 40))
def test_shares_use_every_row_and_forget_nobody(lengths: list[int], extra: int) -> None:
    counts = shares(lengths, len(lengths) + extra)
    assert sum(counts) == len(lengths) + extra
    assert min(counts) >= 1


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    count=st.integers(1, 8),
    steps=st.integers(1, 20),
    whole=st.booleans(),
)
def test_one_pass_in_order_reads_every_step_once(lengths: list[int], count: int, steps: int, whole: bool) -> None:
    sequences = [counting(str(i), length, 1000 * i) for i, length in enumerate(lengths)]
    if sum(lengths) < 2 * count:
        return
    batches = list(StreamSet(sequences, count, steps, whole=whole).in_order())
    assert sorted(step for row in rows(batches) for step in row) == sorted(
        step for sequence in sequences for step in sequence.inputs.tolist()
    )


def test_a_stream_goes_on_where_the_last_chunk_stopped() -> None:
    batches = list(StreamSet([counting("a", 100)], 4, 8).in_order())
    assert rows(batches)[1] == list(range(25, 50))
    assert batches[0].fresh.all()
    assert not batches[1].fresh.any()
    assert batches[-1].weights[1:].sum() == 0


def test_each_new_sequence_begins_fresh() -> None:
    data = StreamSet([counting(str(i), 10, 100 * i) for i in range(5)], 2, 8, whole=True)
    batches = list(data.in_order())
    assert [batch.fresh[0].item() for batch in batches] == [True, False, True, False, True, False]
    assert [batch.fresh[1].item() for batch in batches[:4]] == [True, False, True, False]


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    data = StreamSet([counting("a", 1000)], 4, 16)
    first, again, other = (list(data.epoch(*key)) for key in ((1, 0), (1, 0), (1, 1)))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)
    rest = list(data.epoch(1, 0, first=5))
    assert torch.equal(rest[0].inputs, first[5].inputs)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_streamed_and_windowed_predictions_are_equal_step_by_step(cell: str) -> None:
    """Each window from a zero state gives what a stream that begins there gives."""
    torch.manual_seed(1)
    model = RecurrentModel(ModelConfig("language-model", cell, 2, 8, embedding=4, vocabulary=50)).eval()
    sequence = counting("a", 49)
    windows = WindowSet([sequence], rows=3, steps=12, stride=4)
    for batch in windows.epoch(0, 0):
        outputs, _ = model(batch.inputs, model.initial_state(3))
        for row, (_, start, stop) in enumerate(batch.spans):
            cut = Sequence("cut", sequence.inputs[start:stop], sequence.targets[start:stop], torch.ones(stop - start))
            state = model.initial_state(1)
            for step in range(stop - start):
                single, state = model(cut.inputs[step : step + 1, None], state)
                torch.testing.assert_close(single["logits"][0, 0], outputs["logits"][step, row], atol=1e-6, rtol=0)


def test_padding_and_neighbours_change_nothing() -> None:
    torch.manual_seed(1)
    model = RecurrentModel(ModelConfig("language-model", "gru", 1, 8, embedding=4, vocabulary=300)).eval()
    sequences = [counting("a", 30), counting("b", 7, 100), counting("c", 270, 20)]
    together = losses(model, sequences)
    alone = [losses(model, [sequence])[0] for sequence in sequences]
    assert together == pytest.approx(alone, abs=1e-4)
    assert sum(int(batch.weights.sum()) for batch, _ in streamed(model, sequences)) == 307


def test_windows_overlap_by_the_stride() -> None:
    data = WindowSet([counting("a", 20)], rows=8, steps=8, stride=4)
    assert data.windows == [(0, 0, 8), (0, 4, 12), (0, 8, 16), (0, 12, 20)]
    assert next(iter(data.epoch(0, 0))).fresh.all()


def test_too_little_data_names_the_flag_to_lower() -> None:
    with pytest.raises(DataError, match=r"train\.batch"):
        StreamSet([counting("a", 5)], 32, 8)
    with pytest.raises(DataError, match=r"train\.steps"):
        WindowSet([counting("a", 5)], 4, 8, 1)


def test_only_fresh_rows_are_zeroed() -> None:
    state = (torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    h, c = fresh_state(state, torch.tensor([False, True, False]))
    assert h[:, 1].abs().sum() == 0 and c[:, [0, 2]].min() == 1
