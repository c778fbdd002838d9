"""Two real gloo ranks that differ stop with the difference; what accelerate adds to the last batches is not counted."""

import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from dpo_plugin.compute.batching import PairCollator
from dpo_plugin.engines.ranks import packs_of, rows_that_count
from tests.support import forked
from tests.support.tiny import example

SCRIPT = """
import os, sys
import torch.distributed as dist
from dpo_plugin.engines.ranks import check_ranks_agree

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
check_ranks_agree({"number of micro-steps per epoch": 7, "adapters": "policy a"})
print("agreed", flush=True)
check_ranks_agree({"number of micro-steps per epoch": 7 + rank, "adapters": "policy a"})
"""


def test_ranks_that_differ_all_stop_with_the_difference(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script)]
    ranks = [forked.start([*command, str(rank), str(tmp_path / "meeting")]) for rank in range(2)]
    for rank in [rank.end(timeout=120) for rank in ranks]:
        assert "agreed" in rank.stdout
        assert "RankMismatchError" in rank.stderr
        assert "rank 1: number of micro-steps per epoch is 8, on rank 0 it is 7" in rank.stderr
        assert "adapters is" not in rank.stderr
        assert rank.returncode != 0  # 1, or an abort of gloo's threads where the other rank left first


# ── packs: the sampler's own batches, counted by hand ──

LENGTHS = [(8, 30, 30), (4, 5, 5), (8, 28, 28), (4, 6, 6)]


def accelerator(rank, ranks, rows, size, last, others=0):
    """A rank in the middle of an evaluation; ``others`` is how many packs another rank has."""
    state = SimpleNamespace(
        end_of_dataloader=last,
        remainder=rows % (size * ranks),
        active_dataloader=SimpleNamespace(total_batch_size=size * ranks),
    )
    return SimpleNamespace(
        gradient_state=state,
        num_processes=ranks,
        process_index=rank,
        device="cpu",
        gather=lambda number: torch.cat([number, torch.tensor([others])]),
    )


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
            count = rows_that_count(accelerator(rank, ranks, rows, size, last=number == len(own)), training=False)
            counted += [row for place, row in enumerate(batch) if place < count]
    assert sorted(counted) == list(range(rows))


def test_every_pair_of_training_counts():
    assert rows_that_count(accelerator(0, 2, 9, 4, last=True), training=True) == float("inf")


@pytest.mark.parametrize(("rank", "counted", "weights"), [(0, [[0], []], [1.0, 0.0]), (1, [[], []], [0.0, 0.0])])
def test_packs_weigh_what_counts_and_are_as_many_as_another_ranks(rank, counted, weights):
    """Of nine rows, rank 0 of two has one in its last batch and rank 1 none; that row is the longest."""
    inputs = PairCollator(0, flat=True, max_tokens=100)([example(*sizes) for sizes in LENGTHS])
    assert [pack["places"] for pack in inputs["packs"]] == [[0, 3, 1], [2]]
    packs = packs_of(accelerator(rank, 2, 9, 4, last=True, others=4), inputs, training=False)
    assert [pack["places"] for pack in packs[2:]] == [[0, 3, 1], [2]]
    assert [pack["counted"] for pack in packs] == [[], [], *counted]
    assert [pack["weight"] for pack in packs] == [0, 0, *weights]
    assert [pack["input_ids"].numel() for pack in packs[:2]] == [64, 64]


def test_packs_of_a_whole_batch_weigh_by_their_pairs():
    inputs = PairCollator(0, flat=True, max_tokens=100)([example(*sizes) for sizes in LENGTHS])
    packs = packs_of(accelerator(0, 1, 4, 4, last=True), inputs, training=False)
    assert [pack["weight"] for pack in packs] == [0.75, 0.25]
    assert [packs_of(None, pack, training=True) for pack in packs] == [[pack] for pack in packs]
