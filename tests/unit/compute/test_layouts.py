"""A flat row against two rows on every architecture, and whether the run's own comparison notices a wrong one."""

from functools import partial

import pytest
import torch

from dpo_plugin.compute import attention, lm_head
from dpo_plugin.compute.attention import PairSegments
from dpo_plugin.compute.batching import PairCollator, sequences, shared_segments, to_pair_batch
from dpo_plugin.compute.layouts import compare_layouts, pairs_to_compare, rounding
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import completion_logps, run_model
from tests.support import tiny
from tests.support.architectures import ARCHITECTURES, CHUNK, WITH_STATE, make_config, make_model
from tests.support.tiny import ROOT

PAIRS = [tiny.example(9, 6, 8, 3), tiny.example(4, 12, 5, seed=1), tiny.example(15, 2, 2, 1, seed=2)]

NOT_FLAT = {
    "falcon": "does not let its attention be replaced",
    "llama4_text": "lets tokens of a flat row see",
    "nemotron": "log-probs differ by",
    "stablelm": "log-probs differ by",
    **dict.fromkeys(WITH_STATE, "hand on a state"),
}
"""Why two rows per pair are taken."""

FLAT = [kind for kind in ARCHITECTURES if kind not in NOT_FLAT]
WINDOWED = [kind for kind in FLAT if "sliding_window" in ARCHITECTURES[kind]]


def batch_of(flat, pairs=PAIRS):
    return to_pair_batch(PairCollator(0, flat=flat)(pairs))


def ready(kind, dtype=torch.float64, **settings):
    model = make_model(kind, dtype, **settings).eval()
    attention.attend_to_pairs(model)
    return model


def comparison(model, noise, pairs=PAIRS):
    with torch.no_grad():
        return compare_layouts(
            partial(run_model, model),
            model.get_output_embeddings(),
            batch_of(True, pairs),
            batch_of(False, pairs),
            noise,
        )


def whole(model, batch):
    """The model's own logits of all positions."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return completion_logps(output.logits, batch)


def gradients(model, sums):
    model.zero_grad()
    torch.tanh(sums / 50 * torch.linspace(0.5, 1.5, len(sums), dtype=sums.dtype)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", FLAT)
def test_a_flat_row_is_two_rows_in_fp64(kind):
    """Routers, norms and softmax that a model computes in fp32 leave their rounding in gradients."""
    model = ready(kind)
    expected = whole(model, batch_of(False))
    wanted = gradients(model, expected.sums)
    found = run_model(model, batch_of(True))
    got = gradients(model, found.sums)
    assert (found.sums - expected.sums).abs().max() <= 1e-9
    assert (got - wanted).norm() / wanted.norm() <= 1e-6
    assert comparison(model, 1e-9).why_not is None


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_what_cannot_be_flat_is_known_or_found(kind):
    config = make_config(kind)
    why = attention.prefix_sharing_blocker(config)
    if why is None:
        long = [*PAIRS, tiny.example(CHUNK, 6, 5, seed=3)]
        why = comparison(ready(kind, torch.float32), rounding(torch.float32), long).why_not
    assert NOT_FLAT[kind] in why


@pytest.mark.parametrize("kind", [kind for kind in WITH_STATE if kind not in ("falcon_h1", "jamba")])
def test_layers_with_state_do_mix_pairs(kind, monkeypatch):
    """The second pair's log-probs depend on the first one's tokens, in fp32 by more than rounding."""
    model = ready(kind, torch.float32)
    found = [run_model(model, batch_of(True, [first, PAIRS[1]])).sums[1].item() for first in (PAIRS[0], PAIRS[2])]
    assert abs(found[0] - found[1]) > 1e-2
    assert comparison(model, rounding(torch.float32)).why_not


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_chunks_of_the_head_give_the_models_own_logits(kind, monkeypatch):
    model = make_model(kind).eval()
    rows = batch_of(False)
    expected = whole(model, rows)
    wanted = gradients(model, expected.sums)
    seen = []
    real = lm_head._scores_and_gradient

    def spy(logits, *arguments):
        seen.append(len(logits))
        return real(logits, *arguments)

    monkeypatch.setattr(lm_head, "_scores_and_gradient", spy)
    model.get_output_embeddings().requires_grad_(False)
    found = run_model(model, rows, ForwardOptions(chunk=5))
    assert max(seen) <= 5
    assert (found.sums - expected.sums).abs().max() <= 1e-9
    model.get_output_embeddings().requires_grad_(True)
    found = run_model(model, rows, ForwardOptions(chunk=5))
    got = gradients(model, found.sums)
    assert (got - wanted).norm() / wanted.norm() <= 1e-9


# ── the comparison notices what is wrong ──


def window_off_by_one(monkeypatch, by=1):
    real = PairSegments.mask
    monkeypatch.setattr(
        PairSegments, "mask", lambda self, queries, keys, window: real(self, queries, keys, window and window + by)
    )


def other_parts(monkeypatch, keys_of_chosen, keys_of_rejected):
    """Let chosen and rejected see other tokens of the row than they should: (start, prefix, middle, end) → index."""

    def parts(query, key, value, segments, attend):
        out, start = [], 0
        for prefix, chosen, rejected in segments.lengths:
            middle, end = start + prefix + chosen, start + prefix + chosen + rejected
            places = start, prefix, middle, end
            for first, last, keys in (
                (start, middle, keys_of_chosen(*places)),
                (middle, end, keys_of_rejected(*places)),
            ):
                index = torch.tensor(list(keys))
                out.append(attend(query[:, :, first:last], key[:, :, index], value[:, :, index]))
            start = end
        return torch.cat(out, 1)

    monkeypatch.setattr(attention, "_pair_by_pair", parts)


def right_chosen(start, prefix, middle, end):
    return range(start, middle)


def right_rejected(start, prefix, middle, end):
    return [*range(start, start + prefix), *range(middle, end)]


def hidden_prefix(monkeypatch):
    other_parts(monkeypatch, right_chosen, lambda start, prefix, middle, end: range(middle, end))


def pairs_that_see_each_other(monkeypatch):
    other_parts(monkeypatch, lambda start, prefix, middle, end: range(middle), right_rejected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FLAT)
def test_the_right_one_passes_at_the_tolerance_of_a_run(kind, dtype):
    assert comparison(ready(kind, dtype), rounding(dtype)).why_not is None


@pytest.mark.parametrize("plant", [hidden_prefix, pairs_that_see_each_other])
@pytest.mark.parametrize("kind", FLAT)
def test_a_wrong_one_is_caught_at_the_tolerance_of_a_run(kind, plant, monkeypatch):
    plant(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        assert "log-probs differ by" in comparison(ready(kind, dtype), rounding(dtype)).why_not


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_off_by_one_is_caught_in_every_dtype(kind, by, monkeypatch):
    window_off_by_one(monkeypatch, by)
    for dtype in (torch.float32, torch.bfloat16):
        assert "lets tokens of a flat row see" in comparison(ready(kind, dtype), rounding(dtype)).why_not


def test_the_parts_by_hand_are_the_real_ones(monkeypatch):
    """What the faults above are made with changes nothing by itself."""
    other_parts(monkeypatch, right_chosen, right_rejected)
    assert comparison(ready("gemma2"), 1e-9).why_not is None


def test_a_long_pair_is_compared_where_there_is_a_window():
    short = [tiny.example(5, 5, 5, seed=n) for n in range(300)]
    rows = [*short, tiny.example(30, 20, 9, seed=1), tiny.example(90, 20, 9, seed=1)]
    assert pairs_to_compare(rows, 40) == [rows[300], short[0]]
    assert pairs_to_compare(rows, None) == short[:2]
    assert pairs_to_compare(rows, 1000) == short[:2]


@pytest.mark.parametrize("row", [tiny.example(9, 900, 4), tiny.example(300, 20, 9), tiny.example(200, 200, 200)])
def test_a_pair_is_cut_to_what_the_comparison_needs(row):
    """The end of the prompt, the beginnings of the answers, and 64 tokens beyond the window."""
    for window, length in ((50, 114), (None, 64)):
        (cut,) = pairs_to_compare([row], window)
        assert max(map(len, sequences(cut))) == length
        assert row["prompt_ids"][-len(cut["prompt_ids"]) :] == cut["prompt_ids"]
        assert all(row[side][: len(cut[side])] == cut[side] for side in ("chosen_ids", "rejected_ids"))


def test_pairs_with_something_to_share_are_compared():
    nothing_shared = tiny.example(1, 2, 2)
    rows = [nothing_shared, tiny.example(30, 20, 9, seed=1), tiny.example(90, 20, 9, seed=1)]
    found = pairs_to_compare(rows, None)
    assert found[0] == rows[1]
    assert found[1]["prompt_ids"] == rows[2]["prompt_ids"][-44:]
    assert found[1]["chosen_ids"] == rows[2]["chosen_ids"]
    assert pairs_to_compare([nothing_shared], None) == [nothing_shared]
    assert min(shared_segments(nothing_shared)) < 4


# ── the routers' own loss ──


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("flat", [True, False])
def test_the_routers_loss_is_that_of_the_model_over_two_rows(kind, flat):
    """A token of the shared prefix is routed once in a flat row, and counted twice."""
    model = ready(kind)
    rows = batch_of(False)
    wanted = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False, output_router_logits=True
    ).aux_loss
    found = run_model(model, batch_of(flat), ForwardOptions(router_aux=True)).router_aux
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    (got,) = torch.autograd.grad(found, model.model.layers[1].mlp.gate.weight)
    (slope,) = torch.autograd.grad(wanted, model.model.layers[1].mlp.gate.weight)
    assert slope.norm() > 0
    assert (got - slope).norm() / slope.norm() <= 1e-5
    assert run_model(model, batch_of(flat)).router_aux is None


def test_the_page_of_models_says_the_same():
    """docs/models.md is written by ``make models``; what a flat row can do is tested here."""
    lines = (ROOT / "docs/models.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    flat = {name.strip("`"): cell for name, cell, *_ in rows}
    assert list(flat) == list(ARCHITECTURES)
    for kind, cell in flat.items():
        assert NOT_FLAT[kind] in cell if kind in NOT_FLAT else cell.startswith("✓"), kind


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(monkeypatch):
    """gemma2 runs its own code on chunks, which the compiler must leave alone."""
    model = make_model("gemma2", torch.float32).eval()
    expected = run_model(model, batch_of(False)).sums
    monkeypatch.setattr(lm_head, "_known", lm_head.WeakKeyDictionary())
    found = run_model(torch.compile(model, backend="eager"), batch_of(False)).sums
    assert lm_head._known[model] is lm_head.LogitsFrom.ROOT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    found.sum().backward()
