"""The cache of reference log-probs."""

import math
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_plugin.compute.batching import PairCollator, row_hash, to_pair_batch
from dpo_plugin.compute.logps import run_model
from dpo_plugin.model.cache import (
    _RECORD,
    CachedReference,
    ReferenceLogpCache,
    cache_key,
    config_digest,
    deviation,
    rope_limit,
    weights_digest,
)
from dpo_plugin.model.references import ReferenceStrategy
from dpo_plugin.types import CompletionLogps
from tests.support import tiny

KEYS = [row_hash([1, 2], [3], [n]) for n in range(5)]
VALUES = torch.tensor([[-1.5 * n, -2.25 * n] for n in range(5)])


def filled(folder, rows=slice(None), key="a" * 64):
    cache = ReferenceLogpCache(folder, key)
    cache.put(KEYS[rows], VALUES[rows])
    cache.flush()
    return cache


def test_what_one_process_wrote_another_reads_bit_by_bit(tmp_path):
    filled(tmp_path)
    again = ReferenceLogpCache(tmp_path, "a" * 64)
    assert torch.equal(again.get(KEYS), VALUES)
    assert again.damaged == 0


def test_a_missing_row_is_no_answer(tmp_path):
    cache = filled(tmp_path, slice(0, 3))
    assert cache.get(KEYS) is None
    assert torch.equal(cache.get(KEYS[:3]), VALUES[:3])


def test_stores_of_other_keys_see_nothing(tmp_path):
    filled(tmp_path)
    assert len(ReferenceLogpCache(tmp_path, "b" * 64)) == 0


def test_many_writers_share_a_folder(tmp_path):
    caches = [ReferenceLogpCache(tmp_path, "a" * 64) for _ in range(5)]

    def write(index):
        caches[index].put(KEYS[index : index + 1], VALUES[index : index + 1])
        caches[index].flush()

    threads = [threading.Thread(target=write, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    caches[0].reload()
    assert torch.equal(caches[0].get(KEYS), VALUES)


@pytest.mark.parametrize("cut", [1, 20, 43])
def test_a_torn_record_is_left_out_and_written_anew(tmp_path, cut):
    filled(tmp_path)
    (file,) = (tmp_path / ("a" * 32)).glob("*.logps")
    file.write_bytes(file.read_bytes()[:-cut])
    cache = ReferenceLogpCache(tmp_path, "a" * 64)
    assert (len(cache), cache.damaged) == (4, 1)
    cache.put(KEYS, VALUES)
    cache.flush()
    assert torch.equal(ReferenceLogpCache(tmp_path, "a" * 64).get(KEYS), VALUES)


@pytest.mark.parametrize("byte", range(44, 88, 5))
def test_a_changed_byte_is_noticed(tmp_path, byte):
    filled(tmp_path)
    (file,) = (tmp_path / ("a" * 32)).glob("*.logps")
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(bytes(content))
    cache = ReferenceLogpCache(tmp_path, "a" * 64)
    assert cache.damaged == 1
    assert cache.get(KEYS) is None
    assert torch.equal(cache.get([*KEYS[:1], *KEYS[2:]]), VALUES[[0, 2, 3, 4]])


def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_lost(tmp_path):
    (tmp_path / "file").write_text("")
    cache = filled(tmp_path / "file")  # a file where the folder should be: what root meets on a read-only disk
    assert cache.failure
    assert torch.equal(cache.get(KEYS), VALUES)
    cache.put(KEYS, VALUES)
    cache.flush()


def test_the_row_key_sees_ids_and_where_they_part():
    keys = {
        row_hash([1, 2], [3], [4]),
        row_hash([1], [2, 3], [4]),
        row_hash([1, 2], [4], [3]),
        row_hash([1, 2], [3], [4, 0]),
    }
    assert len(keys) == 4
    assert row_hash([1, 2], [3], [4]) in keys


def test_the_store_key_sees_each_part():
    assert cache_key(a=1, b=[2, None]) == cache_key(b=[2, None], a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(b=1)}) == 3


def test_the_weights_digest_sees_a_changed_block_and_size(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(6_000_000))
    seen = {weights_digest(tmp_path)}
    for position in (0, 5_999_999):
        content = bytearray(6_000_000)
        content[position] = 1
        file.write_bytes(bytes(content))
        seen.add(weights_digest(tmp_path))
    file.write_bytes(bytes(6_000_001))
    seen.add(weights_digest(tmp_path))
    assert len(seen) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_neither_kept_nor_read(tmp_path, bad):
    cache = ReferenceLogpCache(tmp_path, "a" * 64)
    cache.put(KEYS, torch.where(torch.arange(5)[:, None] == 2, bad, VALUES))
    assert cache.get(KEYS[2:3]) is None
    cache.flush()
    (file,) = cache.folder.glob("*.logps")
    record = _RECORD.pack(KEYS[2], bad, -1.0)
    file.write_bytes(file.read_bytes() + record + struct.pack("<I", zlib.crc32(record)))
    again = ReferenceLogpCache(tmp_path, "a" * 64)
    assert (len(again), again.damaged) == (4, 1)


def test_a_folder_in_the_place_of_a_file_is_left_out(tmp_path):
    filled(tmp_path)
    (tmp_path / ("a" * 32) / "x.logps").mkdir()
    cache = ReferenceLogpCache(tmp_path, "a" * 64)
    assert (len(cache), cache.damaged) == (5, 1)


def test_what_is_forgotten_is_gone_from_disk_and_what_is_new_stays(tmp_path):
    filled(tmp_path, slice(0, 3))
    cache = ReferenceLogpCache(tmp_path, "a" * 64)
    cache.put(KEYS[3:], VALUES[3:])
    cache.forget()
    cache.flush()
    assert len(cache) == len(ReferenceLogpCache(tmp_path, "a" * 64)) == 2


def test_what_cannot_be_deleted_is_forgotten_all_the_same(tmp_path, monkeypatch):
    filled(tmp_path)
    cache = ReferenceLogpCache(tmp_path, "a" * 64)
    monkeypatch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(PermissionError("read-only")))
    cache.forget()
    cache.reload()
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, False),
        ({"vocab_size": 300}, False),
        ({"use_cache": False}, True),
        ({"_name_or_path": "elsewhere"}, True),
    ],
)
def test_the_config_digest_sees_what_changes_the_model(change, same):
    assert (config_digest(Qwen2Config(**change)) == config_digest(Qwen2Config())) == same


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
            64,
        ),
    ],
)
def test_the_rows_beside_a_pair_change_its_log_prob_above_the_limit_alone(rope, limit):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    parameters = {**rope, "rope_theta": 1e4}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, rope_parameters=parameters)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    assert rope_limit(model.config) == limit

    def logp(*others):
        batch = to_pair_batch(PairCollator(0)([tiny.example(10, 20, 20), *others]))
        with torch.no_grad():
            return run_model(model, batch).sums[0].item()

    alone = logp()
    assert logp(tiny.example(10, (limit or 128) - 12, 20)) == pytest.approx(alone, abs=1e-3)
    moved = abs(logp(tiny.example(10, (limit or 128) + 12, 20)) - alone)
    assert moved > 0.01 if limit else moved < 1e-3


class _Fixed(ReferenceStrategy):
    """Log-probs by row, from batches whose rounding is `noise`."""

    def __init__(self, values, noise=0.0):
        super().__init__(None)
        self.values, self.noise = values, noise

    def run(self, model, batch, forward):
        sides = torch.stack([self.values[key] for key in batch.row_hashes]).T.flatten()
        return CompletionLogps(sides + self.noise, sides, sides)


class TestCheckOfKeptRows:
    ROWS = tuple(tiny.example(4, 16, 25, seed=n) for n in range(12))

    def batches(self):
        return [to_pair_batch(PairCollator(0)(self.ROWS[n : n + 2])) for n in range(0, 12, 2)]

    def values(self):
        torch.manual_seed(0)
        return {key: torch.rand(2) * -50 for batch in self.batches() for key in batch.row_hashes}

    def run(self, folder, noise=0.0, wrong=0.0, anew=False):
        """Keep log-probs off by `wrong`, and read them in another run."""
        values = self.values()
        cache = ReferenceLogpCache(folder, "a" * 64)
        cache.put(list(values), torch.stack(list(values.values())) + wrong)
        cache.flush()
        said = []
        kept = CachedReference(_Fixed(values, noise), ReferenceLogpCache(folder, "a" * 64), bool, 1e-3, said.append)
        found = [kept.logps(None, batch, None, anew=anew) for batch in self.batches()]
        return kept, torch.cat(found), torch.stack(list(values.values())), said

    def test_the_first_batches_are_run_and_the_others_read(self, tmp_path):
        kept, found, _, said = self.run(tmp_path, noise=1e-3)
        assert (kept.forwards, kept.fresh, said) == (0, False, [])
        read = torch.stack(list(self.values().values()))
        assert torch.equal(found[8:], read[8:])
        torch.testing.assert_close(found[:8], read[:8] + 1e-3)

    def test_wrong_ones_are_dropped_said_once_and_computed_again(self, tmp_path):
        kept, found, expected, said = self.run(tmp_path, wrong=0.01)
        assert torch.equal(found, expected)
        assert len(said) == 1
        assert "are not those of this reference" in said[0]
        assert kept.forwards == 5
        kept.cache.flush()
        after = ReferenceLogpCache(tmp_path, "a" * 64)
        assert torch.equal(after.get(list(self.values())), expected)

    def test_a_batch_can_be_run_anew(self, tmp_path):
        kept, *_ = self.run(tmp_path, noise=1e-3, anew=True)
        assert kept.fresh
        assert kept.forwards == 0

    def test_a_reference_that_is_not_finite_throws_nothing_away(self, tmp_path):
        kept, found, _, said = self.run(tmp_path, noise=math.nan)
        assert found[:8].isnan().all()
        assert (len(kept.cache), said) == (12, [])

    def test_rounding_grows_with_the_square_root_of_the_tokens_and_another_model_with_the_tokens(self):
        tokens = torch.full((4, 2), 400.0)
        kept = torch.full((4, 2), -300.0)
        noise = 0.02 * 20 * torch.tensor([1.0, -1, -1, 1, 1, -1, -1, 1]).reshape(4, 2)
        assert deviation(kept, kept + noise, tokens) == pytest.approx(0.02, rel=1e-4)
        assert deviation(kept, kept + 0.01 * tokens, tokens) == pytest.approx(0.01 * 3200**0.5, rel=1e-4)
        assert deviation(torch.full_like(kept, math.nan), kept, tokens) == 0

    @pytest.mark.parametrize("wrong", [0.0, 0.01])
    def test_ranks_ask_and_forward_together_though_one_alone_has_wrong_rows(self, tmp_path, wrong):
        """A wait that lasts longer than `timeout` is a hang, and breaks the barrier of both."""
        values, batches = self.values(), self.batches()
        barrier, flags, runs, errors = threading.Barrier(2, timeout=30), [False, False], [[], []], []

        def run(rank):
            def on_any_rank(flag):
                barrier.wait()
                flags[rank] = bool(flag)
                barrier.wait()
                return any(flags)

            mine = batches[rank::2] * 3
            cache = ReferenceLogpCache(tmp_path, "a" * 64)
            kept = CachedReference(_Fixed(values), cache, on_any_rank, 1e-3, lambda line: None)
            try:
                for batch in mine:
                    found = kept.logps(None, batch, None)
                    runs[rank].append(kept.fresh)
                    assert torch.equal(found, torch.stack([values[key] for key in batch.row_hashes]))
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        first = ReferenceLogpCache(tmp_path, "a" * 64)
        for rank in (0, 1):
            keys = [key for batch in batches[rank::2] for key in batch.row_hashes]
            first.put(keys, torch.stack([values[key] for key in keys]) + wrong * rank)
        first.flush()
        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert runs[0] == runs[1] == ([True] * 4 + [False] * 5 if not wrong else [True] * 3 + [False] * 6)
