"""Computed buffers against transformers' own at load, and against an engine that rounds them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PhiConfig, Qwen2Config

from dpo_plugin.errors import ConfigError
from dpo_plugin.model.buffers import ComputedBuffers, fresh_buffers

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIGS = {
    "default": Qwen2Config(**SIZES),
    "scaled": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "partial": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "a kind per layer, scaled embeddings": Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
LONG = torch.arange(2048)


def computed(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_an_engine_has_rounded_is_put_back(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    loaded = computed(model)
    assert len(list(fresh_buffers(model))) == len(loaded) >= 2
    model.bfloat16()  # as DeepSpeed's zero.Init and engine do
    angles = [LONG[:, None] * (buffer - loaded[key]) for key, buffer in model.named_buffers() if "inv_freq" in key]
    assert min(angle.abs().max() for angle in angles) > 0.1, "radians at position 2047"
    kept = ComputedBuffers(model)
    assert all(torch.equal(buffer, loaded[key]) for key, buffer in model.named_buffers())
    model.bfloat16()
    kept.restore()
    assert all(torch.equal(buffer, loaded[key]) for key, buffer in model.named_buffers())
    kept.check()


def test_making_buffers_draws_no_random_number_and_leaves_the_model_alone():
    model = AutoModelForCausalLM.from_config(CONFIGS["a kind per layer, scaled embeddings"])
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state()
    list(fresh_buffers(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_frequencies_that_were_rounded_and_widened_again_stop_the_run():
    model = AutoModelForCausalLM.from_config(CONFIGS["default"])
    kept = ComputedBuffers(model)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    with pytest.raises(ConfigError, match=r"`model.rotary_emb.inv_freq` is not what the model's config says") as error:
        kept.check()
    assert len(str(error.value)) < 500


def test_frequencies_of_16_bits_that_nobody_can_compute_stop_the_run():
    model = AutoModelForCausalLM.from_config(CONFIGS["default"])
    model.model.rotary_emb = torch.nn.Module()
    model.model.rotary_emb.register_buffer("inv_freq", torch.ones(4, dtype=torch.bfloat16), persistent=False)
    with pytest.raises(ConfigError, match="Write: deepspeed: <a config of ZeRO stage 2>"):
        ComputedBuffers(model).check()
