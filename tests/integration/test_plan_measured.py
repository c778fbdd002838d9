"""The planned peak of one process against the memory that the real step takes on a CPU.

Three LoRA runs and two of full fine-tuning differ in size, length, checkpointing and precision. A child process makes them
one after the other and reports how far its resident memory grew; nothing in the plan is fitted to these shapes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0}
LORA = {"adapter": "lora", "lora_r": 16, "lora_target_linear": True, "lora_model_dir": "./not-here"}
CASES = {
    "fp32, no checkpointing": (
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 48000},
        {**LORA, "sequence_len": 192, "micro_batch_size": 1},
    ),
    "fp32, checkpointing, longer": (
        {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "vocab_size": 24000},
        {**LORA, "sequence_len": 224, "micro_batch_size": 1, "gradient_checkpointing": True},
    ),
    "bf16 with fp32 adapters, no checkpointing, two pairs": (
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 64000},
        {**LORA, "sequence_len": 80, "micro_batch_size": 2, "bf16": True},
    ),
    "fp32, full fine-tuning, second model": (
        {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "vocab_size": 32000},
        {"sequence_len": 128, "micro_batch_size": 1, "gradient_checkpointing": True},
    ),
    "bf16, full fine-tuning, second model, fp32 master weights": (
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 32000},
        {"sequence_len": 128, "micro_batch_size": 1, "gradient_checkpointing": True, "bf16": True},
    ),
}


def planned(folder: Path, sizes: dict[str, Any], settings: dict[str, Any]) -> int:
    from dpo_plugin.plan.planner import CONTEXT, GIB, Machine, Planner

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, **sizes}))
    cfg = {"base_model": str(folder), "plugins": ["dpo_plugin.DPOPlugin"], "rl": "dpo", **settings}
    return Planner(cfg, "config.yaml", Machine(1, 80 * GIB, 80 * GIB)).need("ddp", cfg).step - CONTEXT


@pytest.mark.slow
def test_planned_peaks_are_the_measured_ones(tmp_path: Path):
    plans = {name: planned(tmp_path / str(n), *case) for n, (name, case) in enumerate(CASES.items())}
    # glibc then gives freed tensors back at once, so that resident memory is what lives
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    child = [sys.executable, __file__, json.dumps(list(CASES.values()))]
    done = subprocess.run(child, capture_output=True, text=True, env={**environment, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))
    ratios = {name: plans[name] / measured[name] for name in CASES}
    print({name: (plans[name] // 2**20, measured[name] // 2**20, round(ratios[name], 3)) for name in CASES})
    assert all(size > 250 * 2**20 for size in measured.values()), measured
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios


# ── the child ──


def resident(which: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def growth(sizes: dict[str, Any], settings: dict[str, Any]) -> int:
    """Bytes by which resident memory grows, at most, over two micro-steps with an optimizer step between them."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    take_steps(sizes, settings)
    return resident("VmHWM") - before


def take_steps(sizes: dict[str, Any], settings: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_plugin.compute import attention

    dtype = torch.bfloat16 if settings.get("bf16") else torch.float32
    config = AutoConfig.for_model(**{**SIZES, **sizes})

    def base() -> Any:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        attention.attend_to_pairs(model)
        return model

    model = base()
    if settings.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.get("adapter"):
        policy = with_adapters(model)
        run(policy, policy, policy.reference_active, settings)
    else:
        run(model, base().requires_grad_(False), contextlib.nullcontext, settings)


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig

    from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel

    policy = PolicyReferenceModel(model, LoraConfig(r=16, target_modules="all-linear"), adapter_name=POLICY)
    policy.add_adapter(REFERENCE, LoraConfig(r=16, target_modules="all-linear"))
    policy.bind_switch()
    policy.train_only_policy()
    return policy


def run(policy: Any, reference: Any, as_reference: Any, settings: dict[str, Any]) -> None:
    import torch

    from dpo_plugin.compute.batching import PairCollator, to_pair_batch
    from dpo_plugin.compute.logps import pair_logps, run_model
    from dpo_plugin.compute.losses import LossOptions, sigmoid
    from dpo_plugin.engines.master_weights import add_master_weights
    from tests.support.tiny import example

    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    add_master_weights(optimizer, policy, pytest.fail)  # there are some in full fine-tuning in bf16 alone
    length = settings["sequence_len"]
    pairs = [example(1, length - 1, length - 1, seed=seed) for seed in range(settings["micro_batch_size"])]
    batch = to_pair_batch(PairCollator(0, flat=True)(pairs))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.get("bf16")))
    policy.train()
    for _ in range(2):
        with autocast:
            found = run_model(policy, batch)
        with torch.no_grad(), as_reference(), autocast:
            fixed = torch.stack(run_model(reference, batch).sums.chunk(2), dim=1)
        sigmoid(pair_logps(found, fixed, 0.1), LossOptions(beta=0.1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as in accumulation, gradients are there while activations are


if __name__ == "__main__":
    warm = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    for precision in (False, True):  # libraries load and import what they need before memory is counted
        take_steps(warm, {**LORA, "sequence_len": 64, "micro_batch_size": 1, "bf16": precision})
    print(json.dumps([growth(*case) for case in json.loads(sys.argv[1])]))
