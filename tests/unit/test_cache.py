"""The store of reference log-probs."""

import threading

import pytest
import torch

from dpo_plugin.compute.batching import row_key
from dpo_plugin.model.cache import ReferenceLogpStore, store_key, weights_digest

KEYS = [row_key([1, 2], [3], [n]) for n in range(5)]
VALUES = torch.tensor([[-1.5 * n, -2.25 * n] for n in range(5)])


def filled(folder, rows=slice(None), key="a" * 64):
    store = ReferenceLogpStore(folder, key)
    store.put(KEYS[rows], VALUES[rows])
    store.flush()
    return store


def test_what_one_process_wrote_another_reads_bit_by_bit(tmp_path):
    filled(tmp_path)
    again = ReferenceLogpStore(tmp_path, "a" * 64)
    assert torch.equal(again.get(KEYS), VALUES)
    assert again.damaged == 0


def test_a_missing_row_is_no_answer(tmp_path):
    store = filled(tmp_path, slice(0, 3))
    assert store.get(KEYS) is None
    assert torch.equal(store.get(KEYS[:3]), VALUES[:3])


def test_stores_of_other_keys_see_nothing(tmp_path):
    filled(tmp_path)
    assert len(ReferenceLogpStore(tmp_path, "b" * 64)) == 0


def test_many_writers_share_a_folder(tmp_path):
    stores = [ReferenceLogpStore(tmp_path, "a" * 64) for _ in range(5)]

    def write(index):
        stores[index].put(KEYS[index : index + 1], VALUES[index : index + 1])
        stores[index].flush()

    threads = [threading.Thread(target=write, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stores[0].reload()
    assert torch.equal(stores[0].get(KEYS), VALUES)


@pytest.mark.parametrize("cut", [1, 20, 43])
def test_a_torn_record_is_left_out_and_written_anew(tmp_path, cut):
    filled(tmp_path)
    (file,) = (tmp_path / ("a" * 32)).glob("*.logps")
    file.write_bytes(file.read_bytes()[:-cut])
    store = ReferenceLogpStore(tmp_path, "a" * 64)
    assert (len(store), store.damaged) == (4, 1)
    store.put(KEYS, VALUES)
    store.flush()
    assert torch.equal(ReferenceLogpStore(tmp_path, "a" * 64).get(KEYS), VALUES)


@pytest.mark.parametrize("byte", range(44, 88, 5))
def test_a_changed_byte_is_noticed(tmp_path, byte):
    filled(tmp_path)
    (file,) = (tmp_path / ("a" * 32)).glob("*.logps")
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(bytes(content))
    store = ReferenceLogpStore(tmp_path, "a" * 64)
    assert store.damaged == 1
    assert store.get(KEYS) is None
    assert torch.equal(store.get([*KEYS[:1], *KEYS[2:]]), VALUES[[0, 2, 3, 4]])


def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_lost(tmp_path):
    (tmp_path / "file").write_text("")
    store = filled(tmp_path / "file")  # a file where the folder should be: what root meets on a read-only disk
    assert store.failure
    assert torch.equal(store.get(KEYS), VALUES)
    store.put(KEYS, VALUES)
    store.flush()


def test_the_row_key_sees_ids_and_where_they_part():
    keys = {
        row_key([1, 2], [3], [4]),
        row_key([1], [2, 3], [4]),
        row_key([1, 2], [4], [3]),
        row_key([1, 2], [3], [4, 0]),
    }
    assert len(keys) == 4
    assert row_key([1, 2], [3], [4]) in keys


def test_the_store_key_sees_each_part():
    assert store_key(a=1, b=[2, None]) == store_key(b=[2, None], a=1)
    assert len({store_key(a=1), store_key(a=2), store_key(b=1)}) == 3


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
