"""One DPO step of a 72B-shaped QLoRA model on one GPU: ours and the stock step, side by side in one process.

The model has Qwen2.5-72B's shape and random weights, made on the device layer by layer: NF4 with double quantisation
and bf16 compute in the decoder layers, bf16 embedding and head, no download. Two LoRA adapters of rank 16 lie on all
linear layers, the trained policy in fp32 and the frozen reference; every layer is checkpointed; a step is one pair.
A shape is a number of tokens per side (prompt and one completion) and the prompt's share of them.

ours_cold   a flat row in which the prompt stands once, the head by chunks, log-probs in fp32; the reference is run
ours_warm   the same with the reference's log-probs given, as from the store
stock       after TRL 1.9's `_compute_loss`: two rows, logits of all positions for policy and reference, log-softmax and
            its sum in the model's dtype, as under DeepSpeed and FSDP2 (one process makes an fp32 copy first). Left out
            is what else it does in a step: metrics from the logits, switching checkpointing and adapters by walking the
            model, axolotl's garbage collection. Both sides are equally long, so it has no padding either. All of that
            is in stock's favour.

Their steps alternate. Before a shape's first step, losses, gradients and log-probs of ours and stock are compared from
the same weights. FLOPs are counted by `step_flops`. The random model costs ln(vocabulary) nats a token or more, so
log-probs are larger than a trained model's, and bf16 sums of them coarser.

    python benchmarks/h200_72b.py            # CUDA: 72B, bounded by --minutes; without CUDA as --small
    python benchmarks/h200_72b.py --small    # a tiny model, seconds

It needs torch, transformers, peft and, for NF4, bitsandbytes; neither axolotl nor trl, and no installed dpo_plugin.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_plugin.compute import attention
from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.logps import pair_logps, run_model
from dpo_plugin.compute.losses import LossOptions, sigmoid
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import PolicyReferenceModel, attach
from dpo_plugin.types import CompletionLogps

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("vocab_size",)
LARGE = dict(zip(SIZES, (8192, 29568, 80, 64, 8, 152064), strict=True))
SMALL = dict(zip(SIZES, (64, 128, 2, 4, 2, 512), strict=True))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, STD, BETA, LEARNING_RATE = 16, 0.02, 0.1, 1e-5
GIB = 2**30

SLACK = 1.2
"""Factor on a shape's expected time: the attention's share grows with length, ours with a shorter prompt."""

CONTENDERS = {"ours_cold": attention.NAME, "stock": "sdpa", "ours_warm": attention.NAME}
"""Name → attention, in the order in which their steps alternate."""

Mark = Callable[[str], None]
"""Takes the name of the part of a step that has just ended."""


def ignore(part: str) -> None:
    """The mark of steps that are not split."""


@dataclass(frozen=True)
class Shape:
    """Tokens per side, and the share of them that is the prompt, in percent."""

    tokens: int
    prompt_percent: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.tokens * self.prompt_percent // 100

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.prompt_percent} % prompt"


# ── the model ──


def build_base(sizes: Mapping[str, int], device: torch.device, nf4: bool) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights that never exists whole in more than its final form.

    Args:
        sizes: Fields of `Qwen2Config`.
        device: Where it is made; bf16 on CUDA, fp32 elsewhere.
        nf4: Quantise the linear layers of the decoder, each as soon as it is drawn.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = Qwen2Config(**sizes, tie_word_embeddings=False, pad_token_id=0, max_position_embeddings=4096)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model.to(dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    draw = torch.Generator(device).manual_seed(0)
    if nf4:
        for parent in list(model.model.layers.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, nf4_linear(child, device, draw))
        model.is_loaded_in_4bit = True  # PEFT asks it which LoRA layer to take
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                is_norm = value.dim() == 1 and name == "weight"
                filled = torch.ones(value.shape, device=device, dtype=dtype) if is_norm else normal(value, device, draw)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    return model


def normal(like: Tensor, device: torch.device, draw: torch.Generator) -> Tensor:
    """Random values of a meta tensor's shape and dtype."""
    return torch.empty(like.shape, device=device, dtype=like.dtype).normal_(0, STD, generator=draw)


def nf4_linear(linear: nn.Linear, device: torch.device, draw: torch.Generator) -> nn.Module:
    """The NF4 form of a linear layer, with random weights quantised on the device; a bias stays on meta."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    ends, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    made = Linear4bit(*ends, bias=False, compute_dtype=dtype, device="meta", **settings)
    made.bias = linear.bias
    made.weight = Params4bit(normal(linear.weight, device, draw), module=made, **settings).to(device)
    return made


def save_adapter(base: nn.Module, folder: Path) -> None:
    """Write a random LoRA of rank `RANK` on all projections in PEFT's form, bf16."""
    LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    ).save_pretrained(str(folder))
    draw, tensors = torch.Generator().manual_seed(1), {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            for part, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                values = torch.randn(shape, generator=draw).mul_(STD).to(torch.bfloat16)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")


def build(sizes: Mapping[str, int], device: torch.device, nf4: bool) -> PolicyReferenceModel:
    """Base, policy and reference, ready to train as axolotl has it on one GPU: bf16 autocast, checkpointing."""
    base = build_base(sizes, device, nf4)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(base, Path(folder))
        adapter = AdapterFolder.open(folder, "lora_model_dir")
        model = attach(base, adapter, adapter)
    attention.attend_to_pairs(base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cuda":
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    return model.train()


# ── FLOPs ──


def layer_weights(sizes: Mapping[str, int], lora: bool = False) -> int:
    """Weights of a decoder layer's seven projections, or of one adapter on them."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    ends = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *3 * [(hidden, inner)]]
    return sum(RANK * (a + b) if lora else a * b for a, b in ends)


def step_flops(sizes: Mapping[str, int], shape: Shape, contender: str) -> int:
    """Model FLOPs of one step: what the contender's own layout asks for, not what its kernels execute.

    Per token and base weight 2 forward, 2 in the recompute, 2 backward, for the input alone as the base is frozen, and
    2 in the reference's forward: 8, or 6 when its log-probs are given. Per LoRA weight 2 + 2 + 4 (+ 2). Attention takes
    4 · hidden per layer and attended (query, key): once forward, once recomputed, twice backward, once in the
    reference. The head takes 2 · hidden · vocabulary per scored position forward and for the input's gradient, and in
    the reference. Norms, activations, softmax, dequantisation and the optimizer are not counted.

    Ours has P + 2C tokens and scores 2C of them; stock has 2 (P + C) and scores all.
    """
    prompt, side, completion = shape.prompt, shape.tokens, shape.tokens - shape.prompt
    if contender == "stock":
        tokens, scored, attended = 2 * side, 2 * side, side * (side + 1)
    else:
        tokens, scored = prompt + 2 * completion, 2 * completion
        attended = side * (side + 1) // 2 + completion * prompt + completion * (completion + 1) // 2
    reference = contender != "ours_warm"
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    base = tokens * layer_weights(sizes) * (8 if reference else 6)
    lora = tokens * layer_weights(sizes, lora=True) * (10 if reference else 8)
    scores = 4 * hidden * attended * (5 if reference else 4)
    return layers * (base + lora + scores) + scored * hidden * sizes["vocab_size"] * (6 if reference else 4)


# ── the steps ──


class Bench:
    """One pair of a shape on the model, as each contender's step.

    Args:
        model: From `build`; trained a little by every step that updates.
        optimizer: Of the policy's parameters.
        shape: Tokens of the pair.
        seed: Of its random token ids.
    """

    def __init__(self, model: PolicyReferenceModel, optimizer: torch.optim.Optimizer, shape: Shape, seed: int):
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        draw = torch.Generator().manual_seed(seed)
        ids = [
            torch.randint(3, model.config.vocab_size, (count,), generator=draw).tolist()
            for count in (shape.prompt, shape.tokens - shape.prompt - 1, shape.tokens - shape.prompt - 1)
        ]
        # Completions differ from their first token on, so what is shared is the prompt.
        pair = {"prompt_ids": ids[0], "chosen_ids": [1, *ids[1]], "rejected_ids": [2, *ids[2]]}
        self.flat = to_pair_batch(self._moved(PairCollator(0, flat=True)([pair])))
        self.rows = self._moved(PairCollator(0)([pair]))
        completion = torch.arange(shape.tokens, device=self.device) >= shape.prompt
        self.completion_mask = completion.expand(2, -1)
        self.kept: Tensor | None = None  # (1, 2) nats, the reference's log-probs for ours_warm

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def reference_logps(self) -> Tensor:
        """(1, 2) nats of chosen and rejected, by the flat row."""
        with torch.no_grad(), self.model.reference_active():
            return torch.stack(run_model(self.model, self.flat).sums.chunk(2), dim=1)

    def ours_cold(self, mark: Mark) -> tuple[Tensor, Tensor]:
        """Loss, and (4,) log-probs in nats: policy's and reference's of chosen and rejected; runs the reference."""
        policy = run_model(self.model, self.flat)
        mark("policy_forward")
        kept = self.reference_logps()
        mark("reference_forward")
        return self._loss(policy, kept)

    def ours_warm(self, mark: Mark) -> tuple[Tensor, Tensor]:
        """The same with the reference's log-probs given."""
        policy = run_model(self.model, self.flat)
        mark("policy_forward")
        assert self.kept is not None
        return self._loss(policy, self.kept)

    def _loss(self, policy: CompletionLogps, kept: Tensor) -> tuple[Tensor, Tensor]:
        logps = pair_logps(policy, kept, BETA)
        loss = sigmoid(logps, LossOptions(beta=BETA)).mean()
        return loss, torch.cat([policy.sums, kept[0]])

    def stock(self, mark: Mark) -> tuple[Tensor, Tensor]:
        """The same as TRL 1.9 has it (trl/trainer/dpo_trainer.py, `_compute_loss`)."""
        policy_logits = self._all_logits()  # held to the end of the loss, as there
        policy = self._completion_sums(policy_logits)
        mark("policy_forward")
        with torch.no_grad(), self.model.reference_active():
            reference_logits = self._all_logits()
            reference = self._completion_sums(reference_logits)
        mark("reference_forward")
        chosen, rejected = policy - reference
        return -logsigmoid(BETA * (chosen - rejected)), torch.cat([policy, reference])

    def _all_logits(self) -> Tensor:
        inputs = {key: self.rows[key] for key in ("input_ids", "attention_mask")}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits[:, :-1]

    def _completion_sums(self, logits: Tensor) -> Tensor:
        """(2,) nats in the logits' dtype: chosen, rejected."""
        labels = self.rows["input_ids"][:, 1:, None]
        per_token = torch.stack([log_softmax(r, -1).gather(-1, of)[:, 0] for r, of in zip(logits, labels, strict=True)])
        return per_token.masked_fill(~self.completion_mask[:, 1:], 0.0).sum(1)

    def step(self, contender: str, mark: Mark = ignore, update: bool = True) -> dict[str, Any]:
        """Forward, loss, backward, clip and, unless told otherwise, update.

        Returns:
            Loss, norm of the policy's gradient, and (4,) log-probs in nats, as tensors without gradient.
        """
        loss, logps = getattr(self, contender)(mark)
        loss.backward()
        mark("backward")
        norm = nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        if update:
            self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        return {"loss": loss.detach(), "grad_norm": norm, "logps": logps.detach()}

    def attempt(self, contender: str, job: Callable[[], Any]) -> Any:
        """A job with the contender's attention, or None if the device's memory does not suffice."""
        self.model.get_base_model().set_attn_implementation(CONTENDERS[contender])
        try:
            return job()
        except torch.OutOfMemoryError:
            pass  # the exception holds the step's tensors, so it has to go before memory is given back
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return None


# ── measuring ──


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, job: Callable[[], Any]) -> tuple[float, float | None]:
    """Seconds of a job, and on CUDA the most memory it allocated, in GiB, the model included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started = time.perf_counter()
    job()
    synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


class Splitter:
    """Adds up the time between marks, with CUDA events that make nothing wait, or the clock elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Note that a part has just ended."""
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def milliseconds(self) -> dict[str, float]:
        """Part → ms."""
        synchronize(self.device)
        parts: dict[str, float] = {}
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            took = before.elapsed_time(now) if self.device.type == "cuda" else 1000 * (now - before)
            parts[part] = parts.get(part, 0.0) + took
        return parts

    @contextmanager
    def around_head(self, head: nn.Module) -> Iterator[None]:
        """Count the head apart from the forward that it is called in; its input's gradient is made there too."""

        def before(*_: Any) -> None:
            self.mark("policy_forward" if torch.is_grad_enabled() else "reference_forward")

        hooks = [head.register_forward_pre_hook(before), head.register_forward_hook(lambda *_: self.mark("head"))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def split_step(bench: Bench) -> dict[str, float]:
    """Parts of an ours_cold step in ms, and the whole by another clock; the loss and the recompute are in backward."""
    splitter = Splitter(bench.device)

    def step() -> None:
        splitter.mark("start")
        bench.step("ours_cold", splitter.mark)

    with splitter.around_head(bench.model.get_output_embeddings()):
        seconds, _ = timed(bench.device, step)
    return {**splitter.milliseconds(), "whole": 1000 * seconds}


def agreement(bench: Bench) -> dict[str, Any]:
    """Loss, gradient norm and log-probs of ours and stock from the same weights, for each that fits in memory."""
    found = {}
    for name in ("ours_cold", "stock"):
        first = bench.attempt(name, partial(bench.step, name, update=False))
        if first is not None:
            found[name] = {key: value.tolist() for key, value in first.items()}
    return found


def measure(bench: Bench, shape: Shape, arguments: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """All figures of one shape; rounds end early, but not before one that counts, when the deadline has passed."""
    first = agreement(bench)
    bench.kept = bench.attempt("ours_warm", bench.reference_logps)
    fits = [*first, "ours_warm"] if bench.kept is not None else first
    taken: dict[str, list[Any]] = {name: [] for name in CONTENDERS if name in fits}
    for number in range(arguments.warmup + arguments.steps):
        if number > arguments.warmup and time.perf_counter() > deadline:
            break
        for name in list(taken):
            took = bench.attempt(name, partial(timed, bench.device, partial(bench.step, name)))
            if took is None:
                del taken[name]
            elif number >= arguments.warmup:
                taken[name].append(took)
    repeats = arguments.split_steps if "ours_cold" in taken else 0
    splits = [bench.attempt("ours_cold", partial(split_step, bench)) for _ in range(repeats)]
    whole = [split for split in splits if split is not None]
    split = {part: statistics.median(one[part] for one in whole) for part in (whole[0] if whole else ())}
    return {**asdict(shape), "first_step": first, "contenders": figures(bench, shape, taken), "split_ms": split}


def figures(bench: Bench, shape: Shape, taken: Mapping[str, list[tuple[float, float | None]]]) -> dict[str, Any]:
    """Speed and memory of the contenders' counted steps; a step is one pair.

    Args:
        bench: With the model that was run.
        shape: The shape that was run.
        taken: Contender → seconds and peak GiB of each step; without those that ran out of memory.
    """
    sizes = {size: getattr(bench.model.config, size) for size in SIZES}
    made: dict[str, Any] = {name: {"out_of_memory": True} for name in CONTENDERS}
    for name, steps in taken.items():
        seconds = [each for each, _ in steps]
        median = statistics.median(seconds)
        ratios = [stock / own for (stock, _), own in zip(taken.get("stock", ()), seconds, strict=False)]
        made[name] = {
            "pairs_per_second": 1 / median,
            "from": 1 / max(seconds),
            "to": 1 / min(seconds),
            "times_stock": statistics.median(ratios) if ratios else None,
            "tflop_per_second": step_flops(sizes, shape, name) / median / 1e12,
            "seconds": seconds,
        }
        if bench.device.type == "cuda":
            made[name]["peak_gib"] = max(peak for _, peak in steps if peak is not None)
    return made


# ── checks of the device ──


def check_attention(device: torch.device, large: bool) -> dict[str, Any]:
    """Flat attention in bf16 as it runs here against fp32 with a mask: largest differences, outputs of order 1."""
    heads, keys, width = (64, 8, 128) if large else (4, 2, 16)
    lengths = [(500, 300, 212), (40, 7, 90)] if large else [(20, 9, 5), (4, 2, 6)]
    total, draw = sum(map(sum, lengths)), torch.Generator(device).manual_seed(0)
    segments = attention.PairSegments(lengths, total, device)
    shapes = [(1, heads, total, width), *2 * [(1, keys, total, width)], (1, total, heads, width)]
    inputs = [torch.randn(s, device=device, generator=draw).to(torch.bfloat16) for s in shapes]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        *qkv, slope = (value.detach().to(dtype) for value in inputs)
        qkv = [value.requires_grad_() for value in qkv]
        out, _ = attention.shared_prefix_attention(nn.Module(), *qkv, None, pair_segments=segments)
        found.append([out.detach().float(), *(g.float() for g in torch.autograd.grad(out, qkv, slope))])
    differences = [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]
    return {
        "varlen_works": attention.varlen_works(device, torch.bfloat16, width, width),
        "max_abs_difference": dict(zip(("output", "d_query", "d_key", "d_value"), differences, strict=True)),
    }


def check_dequantisation(layer: nn.Module, device: torch.device, repeats: int = 20) -> dict[str, float] | None:
    """Time in which a layer's NF4 weights are dequantised, and bytes read and written by it; None without NF4."""
    weights = [weight for weight in layer.parameters() if getattr(weight, "quant_state", None) is not None]
    if not weights:
        return None
    from bitsandbytes.functional import dequantize_4bit

    def whole() -> int:
        full = (dequantize_4bit(weight.data, weight.quant_state) for weight in weights)
        return sum(w.nbytes + w.quant_state.absmax.nbytes + made.nbytes for w, made in zip(weights, full, strict=True))

    moved = whole()
    seconds, _ = timed(device, lambda: [whole() for _ in range(repeats)])
    return {"ms": 1000 * seconds / repeats, "gb_per_second": moved * repeats / seconds / 1e9}


# ── the run ──


def environment(device: torch.device) -> dict[str, Any]:
    """Names and versions that figures depend on."""
    installed = {name: importlib.util.find_spec(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    versions = {name: importlib.metadata.version(name) if spec else None for name, spec in installed.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "versions": versions}


def show(found: dict[str, Any]) -> None:
    """Print one shape's figures."""
    print(f"\n{Shape(found['tokens'], found['prompt_percent'])}")
    for name, one in found["contenders"].items():
        if "out_of_memory" in one:
            print(f"  {name:10} out of memory")
            continue
        peak = f"  peak {one['peak_gib']:.1f} GiB" if "peak_gib" in one else ""
        ratio = "" if one["times_stock"] is None else f"  {one['times_stock']:.2f} × stock"
        speed = f"{one['pairs_per_second']:8.3f} pairs/s ({one['from']:.3f} to {one['to']:.3f})"
        print(f"  {name:10} {speed}{ratio}  {one['tflop_per_second']:.3g} TFLOP/s{peak}")
    for name, first in found["first_step"].items():
        nats = ", ".join(f"{value:.4f}" for value in first["logps"])
        print(f"  {name:10} loss {first['loss']:.6f}  gradient {first['grad_norm']:.4g}  log-probs {nats}")
    print("  ours_cold in ms:", ", ".join(f"{part} {ms:.1f}" for part, ms in found["split_ms"].items()), flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with defaults for the model that is run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model; so it is without CUDA")
    parser.add_argument("--nf4", action="store_true", help="NF4 also without CUDA (needs bitsandbytes)")
    parser.add_argument("--tokens", type=int, nargs="+", help="per side (default 512 1024 2048; small: 32 64)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[50, 30, 70], help="the prompt's share in percent")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--steps", type=int, default=3, help="rounds that count, at most")
    parser.add_argument("--split-steps", type=int, default=1, help="further ours_cold steps that are split into parts")
    parser.add_argument("--minutes", type=float, default=8.3, help="shapes that would end later are left out")
    parser.add_argument("--json", type=Path, default=Path("outputs/h200_72b.json"), help="where the figures go")
    arguments = parser.parse_args(argv)
    arguments.small = arguments.small or not torch.cuda.is_available()
    arguments.tokens = arguments.tokens or ([32, 64] if arguments.small else [512, 1024, 2048])
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Check the device, build the model, measure shape after shape, and print and write what was found."""
    started, arguments = time.perf_counter(), parse(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes, nf4 = (SMALL if arguments.small else LARGE), arguments.nf4 or device.type == "cuda"
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    found: dict[str, Any] = {**environment(device), "sizes": sizes, "nf4": nf4, "arguments": settings}
    found["attention"] = check_attention(device, not arguments.small)
    print(f"{found['device']}, {found['versions']}\nflat attention: {found['attention']}", flush=True)
    model = build(sizes, device, nf4)
    found["dequantisation"] = check_dequantisation(model.get_base_model().model.layers[0], device)
    found["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["build_seconds"] = time.perf_counter() - started
    print(f"dequantising a layer: {found['dequantisation']}")
    print(
        f"{found['trainable_parameters']:,} trainable parameters, built in {found['build_seconds']:.0f} s", flush=True
    )
    found |= {"shapes": [], "left_out": []}
    measure_all(model, arguments, started + 60 * arguments.minutes, found)
    print(f"\n{time.perf_counter() - started:.0f} s in all; left out for time: {found['left_out'] or 'nothing'}")


def measure_all(
    model: PolicyReferenceModel, arguments: argparse.Namespace, deadline: float, found: dict[str, Any]
) -> None:
    """Add to `found` shape by shape, written after each; what would end late, by the last one's time, is left out."""
    parameters = [parameter for _, parameter in model.policy_parameters()]
    fused = parameters[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
    per_token = 0.0
    for shape in [Shape(tokens, percent) for percent in arguments.prompt for tokens in arguments.tokens]:
        now = time.perf_counter()
        if now + per_token * shape.tokens * SLACK > deadline:
            found["left_out"].append(str(shape))
        else:
            bench = Bench(model, optimizer, shape, seed=len(found["shapes"]))
            found["shapes"].append(measure(bench, shape, arguments, deadline))
            per_token = (time.perf_counter() - now) / shape.tokens
            show(found["shapes"][-1])
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
