"""Measure every architecture and write docs/models.md: ``make models``, 25 minutes."""

from __future__ import annotations

import argparse
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dpo_plugin.compute import attention
from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.layouts import compare_layouts
from dpo_plugin.compute.lm_head import LogitsFrom, logits_from
from dpo_plugin.compute.logps import completion_logps, run_model
from tests.ranks.shipped import curve
from tests.support import host, tiny
from tests.support.architectures import ARCHITECTURES, make_config, make_model
from tests.support.cpu_ranks import launch
from tests.support.tiny import ROOT, dpo_config

PAGE = ROOT / "docs" / "models.md"
PAIRS = [tiny.example(9, 6, 8, 3), tiny.example(4, 12, 5, seed=1), tiny.example(15, 2, 2, 1, seed=2)]
STEPS = 3

NOT_ALL_LINEAR = {kind: ["q_proj", "k_proj", "v_proj", "o_proj"] for kind in ("llama4_text", "falcon_h1")}
"""Model types with a linear layer that PEFT does not take: a router that returns more, the last one of a Mamba block."""

ON_RANKS = (
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "glm4_moe", "gpt_oss", "granite", "lfm2", "mistral", "mixtral",
    "olmo3", "phi3", "qwen3", "qwen3_moe",
)  # fmt: skip
"""Model types that are trained on two ranks: each way of attention, head and experts, and a layer with state."""

HEADER = """# Models

Written by `make models`: a tiny random model of each architecture that axolotl packs and transformers {transformers} has as a
causal language model, on a CPU, with axolotl {axolotl}, trl {trl}, peft {peft}, torch {torch}.

- **flat row**: prefixes are shared. Largest difference of a log-prob (nats) and of all gradients (relative) to two rows per
  pair in fp64; norms, routers and softmax that a model computes in fp32 leave their rounding in gradients. Or why two rows are
  taken, which a run says, too. A run compares both layouts on its own model and pairs before the first step.
- **head in chunks**: largest difference of a log-prob, in fp64, to the model's own logits of all positions; *behind* where the
  model does something to what its head returns (a soft-cap, a scale), which is computed in chunks by the model's own code.
- **trained**, **NF4**: three steps of `axolotl train` from an SFT adapter on all linear layers; how far the first loss is from
  ln 2. In NF4 on a base in 4 bits.
- **two ranks**: the largest difference of loss and margin over three steps on two ranks of ZeRO-3 to one process, in bf16; an
  empty field was not run, each way of attention, head and experts was.
- **expert adapters**: as *trained*, with an SFT adapter on the experts' parameters as well (`lora_target_parameters`).

| architecture | flat row | head in chunks | trained | NF4 | two ranks | expert adapters |
|---|---|---|---|---|---|---|
"""


def pairs(flat: bool) -> Any:
    return to_pair_batch(PairCollator(0, flat=flat)(PAIRS))


def whole(model: Any) -> Any:
    rows = pairs(flat=False)
    return completion_logps(model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits, rows).sums


def gradients(model: Any, sums: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    torch.tanh(sums / 50).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def flat_row(kind: str) -> str:
    model = make_model(kind).eval()
    if why := attention.prefix_sharing_blocker(model.config):
        return why
    expected = whole(model)
    slope = gradients(model, expected)
    attention.attend_to_pairs(model)
    forward, head = partial(run_model, model), model.get_output_embeddings()
    with torch.no_grad():
        why = compare_layouts(forward, head, pairs(flat=True), pairs(flat=False), 1e-6).why_not
    if why:
        return why.partition(" (")[0]
    found = run_model(model, pairs(flat=True)).sums
    apart = (found - expected).abs().max().item()
    turned = (gradients(model, found) - slope).norm() / slope.norm()
    return f"✓ {apart:.0e}, {turned:.0e}"


def head_in_chunks(kind: str) -> str:
    model, rows = make_model(kind).eval(), pairs(flat=False)
    apart = (run_model(model, rows).sums - whole(model)).abs().max().item()
    way = logits_from(model, lambda: torch.empty(0), rows)
    if way is LogitsFrom.UNKNOWN:
        return "all completion tokens at once"
    return f"✓ {apart:.0e}{', behind' if way is LogitsFrom.ROOT else ''}"


def save(kind: str, folder: Path) -> Path:
    ids = {"eos_token_id": tiny.tokenizer().eos_token_id, "pad_token_id": tiny.tokenizer().pad_token_id}
    config = make_config(kind, vocab_size=len(tiny.tokenizer()), bos_token_id=None, **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def config(base: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    lora = {"lora_model_dir": str(base / "sft"), "lora_target_modules": None, "lora_target_linear": True}
    usual = {"max_steps": STEPS, "save_strategy": "no", "save_steps": None, "micro_batch_size": 2}
    return dpo_config(base, folder / "out", **{**lora, **usual, **settings})


def trained(base: Path, folder: Path, **settings: Any) -> str:
    lines = host.train(config(base, folder, **settings), folder).lines
    assert len(lines) == STEPS
    return f"✓ {abs(lines[0]['loss'] - math.log(2)):.0e}"


def two_ranks(base: Path, folder: Path) -> str:
    bf16 = {"bf16": True, "save_only_model": True}
    zero3 = {"deepspeed": str(ROOT / "deepspeed_configs/zero3_bf16.json"), "micro_batch_size": 1}
    runs = [
        launch(config(base, folder / name, **bf16, **more), folder / name, ranks=ranks)
        for name, ranks, more in (("one", 1, {}), ("two", 2, zero3))
    ]
    for run in runs:
        assert run.returncode == 0, run.error()
    one, two = (curve(run.lines) for run in runs)
    return f"✓ {(one - two).abs().max():.0e}"


def experts(base: Path) -> list[str]:
    """Name the parameters of a model's experts as ``lora_target_parameters`` does."""
    model = AutoModelForCausalLM.from_pretrained(base)
    names = [name for name, value in model.named_parameters() if ".experts." in name and value.ndim == 3]
    return sorted({".".join(name.split(".")[-3:]) for name in names if "bias" not in name})


def measured(column: Callable[[], str]) -> str:
    try:
        return column()
    except Exception as error:  # the reason is what the table is for
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return re.sub(r"/\S*/", "", last)[:160].replace("|", "/")


def row(kind: str) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save(kind, folder / "base")
        linear = NOT_ALL_LINEAR.get(kind, "all-linear")
        tiny.save_adapter(base, base / "sft", target_modules=linear)
        four_bits = {"adapter": "qlora", "load_in_4bit": True}
        cells = [flat_row(kind), head_in_chunks(kind)]
        cells.append(measured(lambda: trained(base, folder / "lora")))
        cells.append(measured(lambda: trained(base, folder / "nf4", **four_bits)))
        cells.append(measured(lambda: two_ranks(base, folder)) if kind in ON_RANKS else "")
        cells.append("")
        if parameters := experts(base):
            sft = tiny.save_adapter(base, folder / "sft", target_modules=linear, target_parameters=parameters)
            lora = {"lora_model_dir": str(sft), "lora_target_parameters": parameters}
            cells[-1] = measured(lambda: trained(base, folder / "experts", **lora))
    return f"| `{kind}` | {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(ARCHITECTURES), help="print the rows of these alone")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for kind in given.kinds:
        rows.append(row(kind))
        print(rows[-1], end="", flush=True)
    if given.kinds == list(ARCHITECTURES):
        names = ("transformers", "axolotl", "trl", "peft", "torch")
        PAGE.write_text(HEADER.format(**{name: version(name).split("+")[0] for name in names}) + "".join(rows), "utf-8")


if __name__ == "__main__":
    main()
