"""Loading a 4-bit base on two gloo ranks: memory of each rank, time to the first step, and what `plan` says.

Per engine, three starts, each in processes of its own: the host's way (`loading: host`), a first start that makes the
copy in 4 bits, and a second that finds it. Memory is anonymous (RssAnon): pages of a file that is mapped can be dropped
and do not count; sampled every 5 ms from the moment before the base is loaded until training begins, above what it was
at that moment. On a CPU the engine's shards are in it, as they are in a GPU's memory.

    python benchmarks/loading.py [--layers 40] [--hidden 2560] [--engines zero3,fsdp2] [--json benchmarks/loading.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import init_empty_weights
from axolotl.integrations.base import BasePlugin
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from dpo_plugin.model.quantising import return_freed_memory
from dpo_plugin.plan.engines import linear_bytes
from dpo_plugin.plan.machine import Machine
from dpo_plugin.plan.planner import CONTEXT, Planner
from tests.ranks.shipped import BF16, config
from tests.support import tiny
from tests.support.cpu_ranks import launch, records

ROOT = Path(__file__).parents[1]
RANKS = 2
MIB = 2**20
LAYERS = {"fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
ONCE = {"cpu_ram_efficient_loading": True}
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero3": ("zero3-nf4", {}),
    "fsdp2": ("fsdp2-nf4", LAYERS),
    "zero3-bf16": ("zero3-nf4", BF16),
    "fsdp2-bf16": ("fsdp2-bf16-loaded-once", {"fsdp_config": {**LAYERS["fsdp_config"], **ONCE}}),
}
STARTS = {"host": "host", "first": "sharded", "second": "sharded"}
"""What is done in 4 bits; LoRA on a base in 16 bits has the host's way alone."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


# ── in the ranks ──


class Probe(BasePlugin):
    """Samples a rank's anonymous memory while it loads, and notes when it has taken a step."""

    def pre_model_load(self, cfg: Any) -> None:
        """Begin."""
        self.before, self.peak, self.loading = anonymous(), 0, True
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self) -> None:
        """Keep the largest value until training begins."""
        while self.loading:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.005)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """End with the first step."""
        return [Noting(self, cfg.output_dir)]


class Noting(TrainerCallback):
    """Writes what `Probe` has found when the first step is done."""

    def __init__(self, probe: Probe, output_dir: str):
        self.probe, self.output_dir = probe, output_dir

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Stop sampling: the engine has what it holds."""
        self.probe.loading = False
        return_freed_memory()  # what glibc keeps of it is not the engine's
        self.left = anonymous() - self.probe.before

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Write what was found."""
        seconds = time.time() - float(os.environ["LAUNCHED"])
        found = {"peak": self.probe.peak - self.probe.before, "left": self.left, "first_step": seconds}
        rank = os.environ["RANK"]
        (records(self.output_dir) / f"loading-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)[1]) * 1024  # type: ignore[index]


# ── what is loaded ──


def make_base(folder: Path, layers: int, hidden: int) -> None:
    """Write a random Llama in bf16, a few layers at a time."""
    tokenizer = tiny.tokenizer()
    shape = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, vocab_size=len(tokenizer),
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=2048,
        dtype="bfloat16", eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, value in model.state_dict().items():
        number = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(f"model-{int(number[1]) // 8 + 1 if number else 0:05d}.safetensors", {})[name] = value.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        tensors = {name: drawn(name, size, generator) for name, size in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def drawn(name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw a matrix; a norm's weights are 1."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def make_adapter(base: Path, folder: Path) -> None:
    """Write an SFT adapter for it."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
        adapted = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM", base_model_name_or_path=str(base)))
    generator = torch.Generator().manual_seed(1)
    shapes = {name: value.shape for name, value in get_peft_model_state_dict(adapted).items()}
    folder.mkdir()
    save_file(
        {name: torch.empty(size).normal_(0, 0.01, generator=generator) for name, size in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    adapted.peft_config["default"].save_pretrained(folder)


# ── starts ──


def settings(engine: str, loading: str, base: Path, sft: Path, folder: Path) -> dict[str, Any]:
    """Make the config of a start: a shipped recipe, of which one step is trained."""
    name, own = ENGINES[engine]
    section = {"loading": loading, "reference": {"cache": False}, "compute": {"prefix_sharing": False}}
    short = {"max_steps": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": None}
    off = {"save_strategy": "no", "eval_strategy": "no", "eval_steps": None, "test_datasets": None}
    lora = {"lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_target_modules": LORA["target_modules"]}
    cfg = config(name, base, sft, folder, **own, **short, **off, **lora)
    cfg |= {"dpo_plugin": section, "dataset_prepared_path": str(folder.parent / f"prepared-{engine}")}
    if engine.startswith("zero3"):  # of the recipe's, which would keep most of so small a layer whole
        cfg["deepspeed"] = json.loads((ROOT / cfg["deepspeed"]).read_text(encoding="utf-8"))
        cfg["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return cfg


def start(engine: str, kind: str, base: Path, sft: Path, folder: Path) -> list[dict[str, float]]:
    """Train one step, and return what each rank has noted."""
    out = folder / f"{engine}-{kind}"
    cfg = settings(engine, STARTS[kind], base, sft, out)
    run = launch(cfg, out, RANKS, 3600, more_plugins=("benchmarks.loading.Probe",), LAUNCHED=str(time.time()))
    if run.returncode:
        sys.exit(run.error())
    return [json.loads((records(run.output_dir) / f"loading-{r}.json").read_text()) for r in range(RANKS)]


def sizes_of(engine: str, base: Path, sft: Path) -> dict[str, int]:
    """Bytes by `plan`: the base, a layer of it, both adapters in fp32, and the peak of loading either way."""
    found = {}
    for loading in ("host",) if engine.endswith("bf16") else ("host", "sharded"):
        cfg = settings(engine, loading, base, sft, base.parent / engine)
        planner = Planner(cfg, engine, Machine(RANKS, 0, 0))
        found[f"planned {loading}"] = planner.load_peak() - CONTEXT
    sizes, given = planner.model(cfg).sizes, planner.given(planner.used, cfg)
    linear = sum(linear_bytes(sizes, given))
    return {
        **found,
        "base": planner.base_bytes(),
        "layer": linear * sizes.layer_linear // sum(sizes.linear) + sizes.layer_other * 2,
        "adapters": 4 * (sum(sizes.policy) + sum(sizes.reference)),
    }


def report(engine: str, found: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> list[str]:
    """Say what was measured, and whether it is below shard + 2 layers + adapters + 15 %."""
    peaks = {kind: [round(rank["peak"] / MIB) for rank in ranks] for kind, ranks in found.items()}
    steps = {kind: max(rank["first_step"] for rank in ranks) for kind, ranks in found.items()}
    most = 1.15 * (sizes["base"] / RANKS + 2 * sizes["layer"] + sizes["adapters"]) / MIB
    lines = [
        f"{engine}: base {sizes['base'] / MIB:.0f} MiB, a layer {sizes['layer'] / MIB:.1f}, both adapters "
        f"{sizes['adapters'] / MIB:.0f}; shard + 2 layers + adapters + 15 % = {most:.0f} MiB",
        "| start | peak of each rank, MiB | of both, to the host's | by plan, MiB | first step, s | to the host's |",
        "|---|---|---|---|---|---|",
    ]
    for kind, ranks in peaks.items():
        plan = sizes[f"planned {'host' if kind == 'host' else 'sharded'}"] / MIB
        share, faster = sum(ranks) / sum(peaks["host"]), steps["host"] / steps[kind]
        said = f"{ranks[0]}, {ranks[1]} | {share:.2f} | {plan:.0f} ({max(ranks) / plan:.2f})"
        lines.append(f"| {kind} | {said} | {steps[kind]:.0f} | {faster:.1f} |")
    return lines


def main() -> None:
    """Measure, print tables, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--engines", default="zero3,fsdp2", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = ("torch", "transformers", "bitsandbytes", "deepspeed", "accelerate", "axolotl")
    machine = {"cpu": platform.processor(), "versions": {name: importlib.metadata.version(name) for name in names}}
    kept: dict[str, Any] = {"machine": machine, "layers": args.layers, "hidden": args.hidden}
    folder = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        base, sft = folder / "base", folder / "sft"
        base.mkdir()
        make_base(base, args.layers, args.hidden)
        make_adapter(base, sft)
        for engine in args.engines.split(","):
            kinds = ["host"] if engine.endswith("bf16") else list(STARTS)
            found = {kind: start(engine, kind, base, sft, folder) for kind in kinds}
            sizes = sizes_of(engine, base, sft)
            kept[engine] = {"starts": found, "bytes": sizes}
            print("\n".join(report(engine, found, sizes)), flush=True)
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            shutil.rmtree(folder / f"prepared-{engine}", ignore_errors=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
