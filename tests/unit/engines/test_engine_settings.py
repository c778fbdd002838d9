"""What a raw config says of engine and precision."""

import pytest
import torch

from dpo_plugin.engines import config as engines
from dpo_plugin.engines.config import EngineSettings, coarsest_dtype
from tests.support.tiny import ROOT

ZERO3 = str(ROOT / "deepspeed_configs/zero3_bf16.json")
OFFLOAD = str(ROOT / "deepspeed_configs/zero3_bf16_offload.json")


@pytest.mark.parametrize(
    ("cfg", "name", "label", "shards", "offloads"),
    [
        ({}, "ddp", "DDP", False, False),
        ({"deepspeed": {}}, "ddp", "DDP", False, False),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "zero1", "ZeRO-1", False, False),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
            "zero2",
            "ZeRO-2",
            False,
            False,
        ),
        ({"deepspeed": ZERO3}, "zero3", "ZeRO-3", True, False),
        ({"deepspeed": OFFLOAD}, "zero3", "ZeRO-3", True, True),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, "fsdp2", "FSDP", True, True),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": False}}, "fsdp2", "FSDP", True, False),
    ],
)
def test_an_engine_is_read_once_and_says_what_it_does(cfg, name, label, shards, offloads):
    engine = EngineSettings.read(cfg)
    assert (engine.name, engine.label, engine.shards_parameters, engine.offloads) == (name, label, shards, offloads)


@pytest.mark.parametrize("can", [True, False])
@pytest.mark.parametrize(
    ("cfg", "where_it_can", "where_it_cannot"),
    [
        ({}, torch.bfloat16, torch.float16),
        ({"bf16": "auto", "fp16": False}, torch.bfloat16, torch.float32),
        ({"bf16": "auto", "fp16": True}, torch.float16, torch.float16),
        ({"bf16": False}, torch.float16, torch.float32),
        ({"bf16": False, "tf32": False}, torch.float32, torch.float32),
        ({"bf16": False, "tf32": False, "load_in_4bit": True}, torch.float32, torch.float32),
        ({"bf16": False, "tf32": False, "load_in_8bit": True}, torch.bfloat16, torch.bfloat16),
        ({"bf16": False, "tf32": True}, torch.float16, torch.float16),
        ({"bf16": None, "bfloat16": True, "tf32": False}, torch.bfloat16, torch.bfloat16),
        ({"bf16": False, "float16": True}, torch.float16, torch.float16),
    ],
)
def test_the_coarsest_dtype_is_what_the_host_will_choose(monkeypatch, can, cfg, where_it_can, where_it_cannot):
    """On a machine with bf16 and TF32, and on one without."""
    for name in ("is_torch_bf16_gpu_available", "is_torch_tf32_available"):
        monkeypatch.setattr(engines, name, lambda: can)
    assert coarsest_dtype(cfg) == (where_it_can if can else where_it_cannot)
