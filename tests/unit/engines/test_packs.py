"""What accelerate adds to the last batches of an evaluation: the sampler's own batches, counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from dpo_plugin.compute.batching import PairCollator
from dpo_plugin.engines.packs import packs_of, rows_that_count
from tests.support.tiny import example

LENGTHS = [(8, 30, 30), (4, 5, 5), (8, 28, 28), (4, 6, 6)]


def trainer(rank, ranks, rows, size, last, others=0):
    """A rank in the middle of an evaluation; ``others`` is how many packs another rank has."""
    state = SimpleNamespace(
        end_of_dataloader=last,
        remainder=rows % (size * ranks),
        active_dataloader=SimpleNamespace(total_batch_size=size * ranks),
    )
    accelerator = SimpleNamespace(
        gradient_state=state,
        num_processes=ranks,
        process_index=rank,
        device="cpu",
        gather=lambda number: torch.cat([number, torch.tensor([others])]),
    )
    return SimpleNamespace(accelerator=accelerator, model=SimpleNamespace(training=False))


@pytest.mark.parametrize(("rows", "ranks", "size"), [(9, 2, 4), (3, 4, 2), (16, 2, 4), (7, 3, 1), (5, 1, 4), (1, 2, 4)])
def test_each_row_counts_once(rows, ranks, size):
    batches = [
        list(BatchSamplerShard(BatchSampler(range(rows), size, False), ranks, rank, even_batches=True))
        for rank in range(ranks)
    ]
    assert len({len(own) for own in batches}) == 1
    counted = []
    for rank, own in enumerate(batches):
        for number, batch in enumerate(own, 1):
            count = rows_that_count(trainer(rank, ranks, rows, size, last=number == len(own)))
            counted += [row for place, row in enumerate(batch) if place < count]
    assert sorted(counted) == list(range(rows))


def test_every_pair_of_training_counts():
    running = trainer(0, 2, 9, 4, last=True)
    running.model.training = True
    assert rows_that_count(running) == float("inf")


@pytest.mark.parametrize(("rank", "weights"), [(0, [1.0, 0.0]), (1, [0.0, 0.0])])
def test_packs_weigh_what_counts_and_are_as_many_as_another_ranks(rank, weights):
    """Of nine rows, rank 0 of two has one in its last batch and rank 1 none; that row is the longest."""
    inputs = PairCollator(0, flat=True, max_tokens=100)([example(*sizes) for sizes in LENGTHS])
    assert [pack["places"] for pack in inputs["packs"]] == [[0, 3, 1], [2]]
    packs = packs_of(trainer(rank, 2, 9, 4, last=True, others=4), inputs)
    assert [pack["places"] for pack in packs] == [[], [], [0, 3, 1], [2]]
    assert [pack["weight"] for pack in packs] == [0, 0, *weights]
    assert [pack["input_ids"].numel() for pack in packs[:2]] == [64, 64]


def test_packs_of_a_whole_batch_weigh_by_their_pairs():
    inputs = PairCollator(0, flat=True, max_tokens=100)([example(*sizes) for sizes in LENGTHS])
    packs = packs_of(trainer(0, 1, 4, 4, last=True), inputs)
    assert [pack["weight"] for pack in packs] == [0.75, 0.25]
