"""Master weights of bf16 parameters, against AdamW in fp32 written by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.engines.master_weights import (
    add_master_weights,
    check_master_weights,
    load_master_weights,
    master_weight,
    narrow,
    prepare_models,
    save_master_weights,
    widen,
)
from dpo_plugin.errors import CheckpointError, ConfigError

RATE, DECAY, BETAS, EPS = 5e-7, 0.01, (0.9, 0.999), 1e-8


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 48), nn.Linear(48, 8))
    nn.init.normal_(made[0].weight, std=0.02)
    return made.bfloat16()


def groups(of):
    named = list(of.named_parameters())
    return [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": DECAY},
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
    ]


def adamw(of, cls=torch.optim.AdamW, **settings):
    return cls(groups(of), lr=RATE, betas=BETAS, eps=EPS, **settings)


def taken(optimizer, of):
    """Whether the optimizer takes master weights, or what is said when it does not."""
    said = []
    add_master_weights(optimizer, of, said.append)
    assert all("does not take fp32 master weights. Write: optimizer: " in line for line in said)
    return not said


def set_gradients(of, step):
    torch.manual_seed(step)
    for parameter in of.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)


def by_hand(of, steps):
    """Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2, in fp32: the weights after so many steps, by name."""
    weights = {name: p.detach().float() for name, p in of.named_parameters()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        for name, value in weights.items():
            gradient = torch.randn(value.shape).bfloat16().float()
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            mean, square = first[name] / (1 - BETAS[0] ** step), second[name] / (1 - BETAS[1] ** step)
            decayed = value * (1 - RATE * (0.0 if "bias" in name else DECAY))
            weights[name] = decayed - RATE * mean / (square.sqrt() + EPS)
    return weights


def share_moved(now, start):
    moved = sum(int((now[name] != start[name]).sum()) for name in start)
    return moved / sum(value.numel() for value in start.values())


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_the_optimizer_steps_in_fp32_and_the_model_has_what_it_rounds_to(settings):
    policy = model()
    expected, optimizer = by_hand(policy, 3), adamw(policy, **settings)
    assert taken(optimizer, policy)
    for step in (1, 2, 3):
        set_gradients(policy, step)
        optimizer.step()
    masters = {name: master_weight(p) for name, p in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(masters[name], expected[name], rtol=0, atol=0.01 * RATE)
        assert torch.equal(parameter, masters[name].bfloat16())
        assert parameter.grad is None
        assert parameter.dtype == torch.bfloat16


def test_one_step_moves_all_masters_where_bf16_alone_moves_few():
    alone, with_masters = model(), model()
    start = {name: p.detach().float() for name, p in alone.named_parameters()}
    optimizers = adamw(alone), adamw(with_masters)
    assert taken(optimizers[1], with_masters)
    for policy, optimizer in zip((alone, with_masters), optimizers, strict=True):
        set_gradients(policy, 1)
        optimizer.step()
    assert share_moved({name: master_weight(p) for name, p in with_masters.named_parameters()}, start) > 0.99
    assert share_moved({name: master_weight(p).float() for name, p in alone.named_parameters()}, start) < 0.05


def test_groups_frozen_and_fp32_parameters_and_steps_without_gradients_stay_as_they_are():
    policy = model()
    policy[1].weight.requires_grad_(False)
    policy[2].float()
    frozen, optimizer = policy[1].weight.clone(), adamw(policy)
    assert taken(optimizer, policy)
    assert taken(optimizer, policy), "a second call"
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(3, DECAY), (2, 0.0)]
    assert {p.dtype for g in optimizer.param_groups for p in g["params"] if p.requires_grad} == {torch.float32}
    assert optimizer.param_groups[1]["params"][1] is policy[2].bias
    optimizer.step()
    assert torch.equal(policy[1].weight, frozen)
    assert not optimizer.state


def test_a_tied_weight_has_one_master():
    policy = model()
    policy.append(nn.Linear(32, 64, bias=False, dtype=torch.bfloat16))
    policy[3].weight = policy[0].weight
    optimizer = adamw(policy)
    assert taken(optimizer, policy)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(policy.parameters())) == 5


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_keeps_32_bits_for_embeddings_and_8_for_the_rest(kind):
    bnb = pytest.importorskip("bitsandbytes")
    policy = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64)).bfloat16()
    optimizer = getattr(bnb.optim, kind)(policy.parameters(), lr=RATE)
    bnb.optim.GlobalOptimManager.get_instance().register_module_override(policy[0], "weight", {"optim_bits": 32})
    assert taken(optimizer, policy)
    places = [(0, place) for place in range(3)]
    bits = [optimizer.get_config(*place, optimizer.param_groups[0])["optim_bits"] for place in places[:2]]
    assert bits == [32, 8]


class InBackward(torch.optim.SGD):
    """As LOMO, which has updated the weights when backward ends."""

    def fused_backward(self, loss, lr):
        loss.backward()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda policy: InBackward(policy.parameters(), lr=RATE),
        lambda policy: torch.optim.SGD([torch.zeros(1)], lr=RATE),
        lambda policy: torch.optim.Adagrad(policy.parameters(), lr=RATE),
    ],
    ids=["in backward", "layer by layer", "with states from the start"],
)
def test_an_optimizer_that_takes_no_masters_is_left_as_it_is(optimizer):
    policy = model()
    made = optimizer(policy)
    before = [parameter for group in made.param_groups for parameter in group["params"]]
    assert not taken(made, policy)
    assert all(a is b for a, b in zip(before, made.param_groups[0]["params"], strict=True))
    assert all(master_weight(parameter).dtype == torch.bfloat16 for parameter in policy.parameters())


def stepped(policy, first, last):
    """An optimizer of a policy, after steps."""
    optimizer = adamw(policy)
    assert taken(optimizer, policy)
    for step in range(first, last + 1):
        set_gradients(policy, step)
        optimizer.step()
    return optimizer


def test_masters_are_saved_and_loaded_bit_by_bit(tmp_path):
    saved, loaded = model(), model()
    stepped(saved, 1, 3)
    save_master_weights(saved, tmp_path)
    stepped(loaded, 1, 0)
    load_master_weights(loaded, tmp_path)
    for ours, theirs in zip(loaded.parameters(), saved.parameters(), strict=True):
        assert torch.equal(master_weight(ours), master_weight(theirs))


def test_masters_of_another_model_are_refused(tmp_path):
    saved, loaded = model(), model()
    saved[2].bias.requires_grad_(False)
    stepped(saved, 1, 1)
    save_master_weights(saved, tmp_path)
    stepped(loaded, 1, 1)
    with pytest.raises(CheckpointError, match=r"2\.bias is missing.*Write: resume_from_checkpoint: <another"):
        load_master_weights(loaded, tmp_path)
    with pytest.raises(CheckpointError, match=r"0\.weight is missing"):
        load_master_weights(loaded, tmp_path / "empty")


def test_a_model_without_masters_saves_none(tmp_path):
    save_master_weights(model(), tmp_path)
    load_master_weights(model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_widened_is_saved_as_it_was():
    policy = model()
    policy[1].requires_grad_(False)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    widened = widen(policy)
    assert widened == {"0.weight", "2.weight", "2.bias"}
    assert policy[0].weight.dtype == torch.float32
    assert policy[1].weight.dtype == torch.bfloat16
    saved = narrow({**policy.state_dict(), "a buffer": torch.ones(1)}, widened)
    assert saved.pop("a buffer").dtype == torch.float32
    assert all(torch.equal(saved[name], state[name]) and saved[name].dtype == torch.bfloat16 for name in state)


def test_deepspeed_always_has_master_weights():
    engine = EngineSettings.read({"deepspeed": {"zero_optimization": {"stage": 2}}})
    check_master_weights(True, engine)
    check_master_weights(False, EngineSettings.read({}))
    with pytest.raises(ConfigError, match=r"under ZeRO-2: DeepSpeed always.*Write: master_weights: true"):
        check_master_weights(False, engine)


def test_what_the_model_keeps_in_fp32_stays_so():
    policy = model()
    for name in ("0", "2"):
        policy.get_submodule(name).float()
    policy._keep_in_fp32_modules = ["2"]
    accelerator = SimpleNamespace(state=SimpleNamespace(), is_fsdp2=False)
    assert prepare_models(True, accelerator, policy, None)
    dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"2.weight", "2.bias"}
