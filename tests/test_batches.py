"""Random crops: golden values, bounds, and how a batch is shared."""

import numpy as np
import pytest
import torch

from gptlib import GptlibError
from gptlib.batches import Batches, crop_offsets, crops, to_device


GOLDEN = {  # (seed, step, positions) -> the first offsets, on every machine and NumPy
    (0, 0, 1000): [11, 241, 111, 564],
    (1337, 0, 117_919_884): [108441046, 116080473, 13323854, 97488475],
    (1337, 3399, 117_919_884): [24819315, 99197659, 79890525, 64056691],
    (2**63, 2**40, 5000): [2037, 1937, 2818, 310],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_offsets_are_the_same_everywhere(key):
    seed, step, positions = key
    offsets = crop_offsets(seed, step, 4, positions)
    assert offsets.tolist() == GOLDEN[key] and offsets.dtype == np.int64
    assert crop_offsets(seed, step, 400, positions)[:4].tolist() == GOLDEN[key]


def test_offsets_ignore_all_other_random_state():
    expected = crop_offsets(3, 4, 10, 10**6)
    np.random.seed(0)
    torch.manual_seed(0)
    np.random.rand(5)
    assert np.array_equal(crop_offsets(3, 4, 10, 10**6), expected)
    assert not np.array_equal(crop_offsets(3, 5, 10, 10**6), expected)
    assert not np.array_equal(crop_offsets(4, 4, 10, 10**6), expected)


@pytest.mark.parametrize("positions", [1, 2, 3, 1000, 2**32 - 1, 2**32])
def test_offsets_stay_in_bounds(positions):
    offsets = np.concatenate(
        [crop_offsets(0, step, 1000, positions) for step in range(20)]
    )
    assert offsets.min() >= 0 and offsets.max() < positions
    if positions <= 1000:
        assert len(np.unique(offsets)) == positions
    else:
        assert offsets.max() > 0.999 * positions and offsets.min() < 0.001 * positions


def test_more_positions_than_32_bits():
    with pytest.raises(ValueError, match="starts are more than"):
        crop_offsets(0, 0, 1, 2**32 + 1)


def test_targets_are_the_inputs_moved_on_by_one():
    ids = np.arange(65_000, 65_100, dtype=np.uint16)
    x, y = crops(ids, np.array([0, 7, 91]), 8)
    assert x.shape == y.shape == (3, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and x[:, 0].tolist() == [65_000, 65_007, 65_091]
    assert x.is_contiguous() and y.is_contiguous()
    x[0, 0] = 1  # a batch is a copy of the file
    assert ids[0] == 65_000


def test_last_token_is_reached_and_nothing_beyond():
    ids = np.arange(20, dtype=np.uint16)
    batches = Batches(ids, batch_size=50, block_size=6, seed=0)
    offsets = np.concatenate([batches.offsets(step) for step in range(20)])
    assert set(offsets.tolist()) == set(range(14))
    targets = torch.cat(
        [y for step in range(20) for _, y in batches.micro_batches(step, 50)]
    )
    assert targets.max() == 19 and targets.min() == 1


@pytest.mark.parametrize(
    "micro,world", [(24, 1), (1, 1), (5, 1), (3, 2), (4, 3), (6, 4), (1, 24), (12, 2)]
)
def test_batch_does_not_depend_on_micro_batch_or_world_size(micro, world):
    ids = np.arange(5000, dtype=np.uint16)
    batches = Batches(ids, batch_size=24, block_size=10, seed=7)
    dealt = [
        list(batches.micro_batches(3, micro, rank, world)) for rank in range(world)
    ]
    starts = sorted(int(row[0]) for part in dealt for x, _ in part for row in x)
    assert starts == sorted(batches.offsets(3).tolist())
    assert all(len(x) <= micro for part in dealt for x, _ in part)


def test_offsets_equal_their_formula_in_whole_numbers_of_python():
    for seed, step, positions in ((0, 0, 7), (5, 12, 10**6), (2**40, 3, 2**32)):
        bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(50)
        expected = [(int(r) >> 32) * positions >> 32 for r in bits]
        assert crop_offsets(seed, step, 50, positions).tolist() == expected


def test_a_resumed_leg_goes_on_and_does_not_begin_again():
    ids = np.arange(5000, dtype=np.uint16)
    seen = {}
    for leg in (range(3), range(3, 9)):  # each leg has a new object, as after a restart
        batches = Batches(ids, 4, 16, seed=1)
        for step in leg:
            (pair,) = batches.micro_batches(step, 4)
            seen[step] = tuple(pair[0][:, 0].tolist())
    assert len(set(seen.values())) == 9, "a restart reads the first steps again"
    assert list(seen[4]) == crop_offsets(1, 4, 4, 5000 - 16).tolist()


@pytest.mark.parametrize("length", [0, 1, 8])
def test_corpus_shorter_than_a_block(length):
    message = f"{length} tokens are too few for one block of 8"
    with pytest.raises(GptlibError, match=message):
        Batches(np.zeros(length, np.uint16), batch_size=2, block_size=8, seed=0)
    assert Batches(np.zeros(9, np.uint16), 2, 8, 0).offsets(0).tolist() == [0, 0]


def test_with_a_mark_a_window_begins_where_its_document_does():
    """The last mark at or before the place drawn; the beginning, if there is none."""
    ids = np.random.default_rng(0).integers(1, 9, 400).astype(np.uint16)
    ids[[5, 6, 40, 41, 390, 399]] = 0
    for stream in (ids, ids[7:38]):
        plain = Batches(stream, 500, 8, seed=3)
        marked = Batches(stream, 500, 8, seed=3, mark=0)
        drawn = plain.offsets(2)
        expected = [
            max([0, *(i for i in range(place + 1) if stream[i] == 0)])
            for place in drawn.tolist()
        ]
        assert marked.offsets(2).tolist() == expected
        assert len(set(expected)) == (6 if len(stream) == 400 else 1)


def test_to_device_keeps_order_and_stays_one_ahead():
    fetched = []

    def pairs():
        for i in range(4):
            fetched.append(i)
            yield torch.tensor([i]), torch.tensor([i + 1])

    ahead = []
    found = []
    for x, y in to_device(pairs(), torch.device("cpu")):
        ahead.append(len(fetched))
        found.append((x.item(), y.item()))
    assert found == [(0, 1), (1, 2), (2, 3), (3, 4)] and ahead == [2, 3, 4, 4]
    assert list(to_device(iter([]), torch.device("cpu"))) == []


def test_batches_of_three_tensors_move_as_well():
    """Fine-tuning has a weight for each target."""
    batches = [tuple(torch.full((2,), 3 * i + k) for k in range(3)) for i in range(3)]
    moved = list(to_device(batches, torch.device("cpu")))
    assert len(moved) == 3
    for before, after in zip(batches, moved):
        assert all(map(torch.equal, before, after)) and len(after) == 3
