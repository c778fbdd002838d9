"""A DPO step, ours against its rivals', in one process and interleaved: pairs/s, peak memory, and equality.

Contenders, all from the same base, SFT adapter, pairs and optimizer, with gradient checkpointing:

    stock       the installed axolotl's AxolotlDPOTrainer on a PeftModel, with TRL's own `ref` adapter
    stock-nogc  the same without the garbage collection after each micro-step of axolotl before 0.21
    liger       the same with TRL's `use_liger_kernel`, where it runs
    trl         the imported TRL's own DPOTrainer on the same; from 1.16 on with its fused head, which is always on
    ours        dpo_plugin, the reference run in every step
    ours-warm   dpo_plugin with the reference's log-probs kept

`--against` names the rivals. Ratios are to the first, which runs in every case; the others run at 50 % prompt. A rival
that is stock on this host (stock-nogc without such a collection, liger on a TRL with a fused head) runs as stock.
A step is collate, forward, backward and optimizer. Each round runs one step of every contender on the same pairs.

    python benchmarks/step.py [--against trl,stock] [--only speed] [--steps 30] [--quick] [--json benchmarks/step.json]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from tests.support import host, tiny

RANK = 16
BODY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen2"},
    "window": {"model_type": "mistral", "sliding_window": 128},
    "moe": {
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 352,
        "head_dim": 32,
    },
}  # fmt: skip
"""What `--shape` adds to the body; the LoRA of a mixture is on attention alone."""
CHECKPOINTING = {"use_reentrant": False}
Pair = dict[str, Any]


# ── pairs ──


def pair(draw: random.Random, prompt: int, chosen: int, rejected: int, vocabulary: int) -> Pair:
    """Random ids; the two completions differ from their first token on."""

    def ids(count: int) -> list[int]:
        return [draw.randrange(300, vocabulary) for _ in range(count)]

    sides = {"chosen_ids": [298, *ids(chosen - 1)], "rejected_ids": [299, *ids(rejected - 1)]}
    return {"prompt_ids": ids(prompt), **sides}


def of_share(draw: random.Random, tokens: int, share: float, vocabulary: int) -> Pair:
    """The longer side has this many tokens, a share of them prompt; the other completion has 60 to 100 % of its."""
    prompt = round(tokens * share)
    longer = tokens - prompt
    lengths = [longer, max(1, round(longer * draw.uniform(0.6, 1.0)))]
    draw.shuffle(lengths)
    return pair(draw, prompt, *lengths, vocabulary)


def of_mix(draw: random.Random, tokens: int, vocabulary: int) -> Pair:
    """Log-normal lengths: prompts of median 120 tokens, completions of median 90, σ = 0.8, cut to fit."""
    prompt = min(tokens // 2, max(4, int(120 * draw.lognormvariate(0, 0.8))))
    lengths = [min(tokens - prompt, max(2, int(90 * draw.lognormvariate(0, 0.8)))) for _ in range(2)]
    return pair(draw, prompt, *lengths, vocabulary)


# ── contenders ──


class Contender:
    """A trainer whose steps are driven from outside.

    Args:
        trainer: Ours or stock's.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        trainer.model.gradient_checkpointing_enable(CHECKPOINTING)
        trainer.model.enable_input_require_grads()
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
        self.optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-5)

    def backward(self, pairs: list[Pair]) -> float:
        """Collate, forward and backward of one micro-batch; the loss."""
        trainer = self.trainer
        inputs = trainer._prepare_inputs(trainer.data_collator(pairs))
        return float(trainer.training_step(trainer.model, inputs))

    def step(self, pairs: list[Pair]) -> float:
        """Seconds of one whole step."""
        started = time.perf_counter()
        self.backward(pairs)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def gradient(self, pairs: list[Pair]) -> Tensor:
        """The policy adapter's gradient, flat, by sorted name; the adapter stays as it is."""
        self.backward(pairs)
        named = {
            name.replace(".policy", "").replace(".default", ""): p.grad.flatten().clone()
            for name, p in self.trainer.model.named_parameters()
            if p.grad is not None
        }
        self.optimizer.zero_grad()
        return torch.cat([named[name] for name in sorted(named)])


def make_contenders(names: list[str], root: Path, vocabulary: int, shape: str = "dense") -> dict[str, Contender]:
    """The contenders by name; of a rival that does not run, the reason is printed."""
    base = save_base(root / f"base{vocabulary}", vocabulary, shape)
    projections = tiny.PROJECTIONS[:4] if shape == "moe" else tiny.PROJECTIONS
    sft = tiny.save_adapter(base, root / f"sft{vocabulary}", r=RANK, lora_alpha=RANK, target_modules=projections)
    made = {}
    for name in names:
        try:
            made[name] = Contender(MAKERS[name](base, sft, root / name))
            if name in RIVALS:
                made[name].gradient([of_share(random.Random(0), 32, 0.5, vocabulary)])
        except Exception as error:
            if name not in RIVALS:
                raise
            made.pop(name, None)
            print(f"{name}: does not run here: {type(error).__name__}: {' '.join(str(error).split())[:600]}")
    if not RIVALS & made.keys() and RIVALS & set(names):
        raise SystemExit("None of the rivals runs here: name others with --against")
    return made


def distinct(rivals: list[str]) -> list[str]:
    """The rivals, each once: what this host does by itself is stock."""
    import trl.trainer.dpo_trainer
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

    is_stock = {
        "stock-nogc": "collect" not in AxolotlDPOTrainer.training_step.__code__.co_names,
        "liger": hasattr(trl.trainer.dpo_trainer, "add_fused_lm_head"),
    }
    return list(dict.fromkeys("stock" if is_stock.get(rival) else rival for rival in rivals))


def save_base(folder: Path, vocabulary: int, shape: str) -> Path:
    """A random model of a shape with the tiny tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**BODY, **SHAPES[shape], vocab_size=vocabulary, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def stock(*paths: Path, collects: bool = True, **settings: Any) -> Any:
    """The installed axolotl's trainer."""
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

    class WithoutCollection(AxolotlDPOTrainer):  # type: ignore[misc]
        def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
            return super(AxolotlDPOTrainer, self).training_step(*arguments, **keywords)

    return theirs(AxolotlDPOTrainer if collects else WithoutCollection, AxolotlDPOConfig, *paths, **settings)


def plain_trl(*paths: Path) -> Any:
    """The imported TRL's trainer."""
    from trl import DPOConfig, DPOTrainer

    return theirs(DPOTrainer, DPOConfig, *paths)


def theirs(trainer: Any, config: Any, base: Path, sft: Path, folder: Path, **settings: Any) -> Any:
    """A trainer of TRL's family; TRL copies the trainable adapter to its own `ref`."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sft, is_trainable=True)
    args = config(
        output_dir=str(folder), report_to=[], bf16=False, max_length=None, gradient_checkpointing=True,
        gradient_checkpointing_kwargs=CHECKPOINTING, use_cpu=not torch.cuda.is_available(),
        router_aux_loss_coef=0.0, **settings,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "Question?", "chosen": "Yes.", "rejected": "No."}])  # steps bring their own
    return trainer(model=model, args=args, processing_class=tiny.tokenizer(), train_dataset=rows)


def ours(base: Path, sft: Path, folder: Path, warm: bool = False) -> Any:
    """Our trainer, as axolotl builds it."""
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer

    folder.mkdir(parents=True, exist_ok=True)
    reference = {"cache": str(folder / "kept") if warm else False}
    config = tiny.dpo_config(
        base, folder / "out", lora_model_dir=str(sft), lora_r=RANK, lora_alpha=RANK, gradient_checkpointing=True,
        lora_target_modules=None, lora_target_linear=True, dpo_plugin={"reference": reference},
    )  # fmt: skip
    cfg = host.load_config(config, folder)
    data = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    return setup_model_and_trainer(cfg, data)[0]


def bare(*paths: Path) -> Any:
    """Our trainer without what a log line is made of."""
    from types import SimpleNamespace

    trainer = ours(*paths)
    trainer.recorder = SimpleNamespace(add=lambda *_: None)
    step = trainer.preference_step
    step.forward_options = replace(step.forward_options, entropy=False)
    return trainer


MAKERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "stock": stock,
    "stock-nogc": lambda *paths: stock(*paths, collects=False),
    "liger": lambda *paths: stock(*paths, collects=False, use_liger_kernel=True),
    "trl": plain_trl,
    "ours": ours,
    "ours-warm": lambda *paths: ours(*paths, warm=True),
}
RIVALS = MAKERS.keys() - {"ours", "ours-warm"}


# ── measuring ──


def peak_growth(job: Callable[[], Any]) -> float:
    """MiB by which the resident set grew at most while the job ran (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    job()
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """A line of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def race(contenders: dict[str, Contender], batches: list[list[Pair]], warm_up: int) -> dict[str, list[float]]:
    """Seconds per counted step, interleaved; a kept reference is filled before."""
    for name, contender in contenders.items():
        if name == "ours-warm":
            with torch.no_grad():
                for pairs in batches:
                    contender.trainer.cache_reference(contender.trainer.data_collator(pairs))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number, pairs in enumerate(batches):
        for name, contender in contenders.items():
            took = contender.step(pairs)
            if number >= warm_up:
                seconds[name].append(took)
    return seconds


def summary(seconds: dict[str, list[float]], pairs: int) -> dict[str, Any]:
    """Medians, spreads, and ratios to the first from steps on the same pairs."""
    against = next(iter(seconds.values()))
    found = {}
    for name, steps in seconds.items():
        ratios = [theirs / own for theirs, own in zip(against, steps, strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        found[name] = {
            "pairs_per_s": pairs / statistics.median(steps),
            "ratio": sum(against) / sum(steps),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [quarters[0], quarters[2]],
            "seconds": [round(step, 4) for step in steps],
        }
    return found


def equality(contenders: dict[str, Contender], pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """By rival, the largest |Δ log-prob| in nats and the relative Δ gradient to ours at the same weights."""
    own = contenders["ours"]
    gradient, logps = own.gradient(pairs), logged(own.trainer)
    found = {}
    for name in [name for name in contenders if name in RIVALS]:
        wanted = contenders[name].gradient(pairs)
        found[name] = {
            "logps": max(abs(a - b) for a, b in zip(logged(contenders[name].trainer), logps, strict=True)),
            "gradient": float((gradient - wanted).norm() / wanted.norm()),
        }
    return found


def logged(trainer: Any) -> list[float]:
    """Chosen and rejected log-probs of the step that has just run."""
    if hasattr(trainer, "recorder"):
        means = trainer.recorder.fields(trainer.model, "", 0, since_start=False)
        return [means["logps/chosen"], means["logps/rejected"]]
    return [trainer._metrics["train"][f"logps/{side}"][-1] for side in ("chosen", "rejected")]


# ── what is measured ──


def speed(root: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prompt shares and the log-normal mix, at micro-batch 1 and 4."""
    made = make_contenders([*arguments.against, "ours", "ours-warm"], root, 8192, arguments.shape)
    usual = [next(iter(made)), "ours", "ours-warm"]
    shares = [0.5] if arguments.quick else [0.1, 0.3, 0.5, 0.7, 0.9]
    cases = [(1, share) for share in [*shares, None]] + [(4, 0.5), (4, None)]
    if arguments.case:
        cases = [case for case in cases if f"{case[0]},{case[1] or 'mix'}" in arguments.case]
    for size, share in cases:
        draw = random.Random(7)
        make = (lambda: of_share(draw, arguments.tokens, share, 8192)) if share else lambda: of_mix(draw, 512, 8192)  # noqa: B023
        batches = [[make() for _ in range(size)] for _ in range(arguments.warm_up + arguments.steps)]
        taking_part = {n: c for n, c in made.items() if n in usual or share == 0.5}
        equal = equality(taking_part, batches[0]) if (size, share) == cases[0] else None
        found = summary(race(taking_part, batches, arguments.warm_up), size)
        steps = statistics.median(found["ours"]["seconds"]) * 100
        yield {
            "shape": arguments.shape,
            "micro_batch": size,
            "prompt_share": share or "log-normal mix",
            "contenders": found,
            "equality": equal,
            "comparison_of_100_steps": comparison(made["ours"].trainer, batches) / steps,
        }


def comparison(trainer: Any, batches: list[list[Pair]]) -> float:
    """Seconds in which a run compares a flat row with two rows, once before its first step."""
    from dpo_plugin.host.batches import decide_layout

    data, trainer.train_dataset, trainer.compared = (
        trainer.train_dataset,
        [row for rows in batches for row in rows],
        None,
    )
    started = time.perf_counter()
    decide_layout(trainer)
    seconds = time.perf_counter() - started
    trainer.train_dataset = data
    assert trainer.data_collator.flat, trainer.compared
    return seconds


def memory(root: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak growth of a step at the vocabulary of Qwen2.5, one pair."""
    vocabulary = 2048 if arguments.quick else 152_064
    made = make_contenders([*arguments.against, "ours"], root, vocabulary)
    pairs = [of_share(random.Random(3), 2 * arguments.tokens, 0.5, vocabulary)]
    growth: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(2 if arguments.quick else 5):
        for name, contender in made.items():
            growth[name].append(peak_growth(lambda: contender.backward(pairs)))  # noqa: B023
            contender.optimizer.zero_grad()
    middle = {name: statistics.median(values[1:]) for name, values in growth.items()}
    yield {
        "memory": {"vocabulary": vocabulary, "tokens": 2 * arguments.tokens, "peak_mib": middle},
        "share_of": {name: middle["ours"] / peak for name, peak in middle.items() if name in RIVALS},
        "equality": equality(made, pairs),
    }


class Logging(Contender):
    """Makes the figures of a log line after every step."""

    def backward(self, pairs: list[Pair]) -> float:
        """A micro-batch, and its figures over all ranks."""
        loss = super().backward(pairs)
        self.trainer.recorder.fields(self.trainer.model, "", 0, since_start=True)
        return loss


def metrics(root: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What all metrics cost, logged at every step, in shares of a step without any."""
    base = save_base(root / "base", 8192)
    sft = tiny.save_adapter(base, root / "sft", r=RANK, lora_alpha=RANK)
    made = {"bare": Contender(bare(base, sft, root / "bare")), "logged": Logging(ours(base, sft, root / "ours"))}
    draw = random.Random(7)
    batches = [[of_share(draw, arguments.tokens, 0.5, 8192)] for _ in range(arguments.warm_up + arguments.steps)]
    seconds = race(made, batches, arguments.warm_up)
    shares = [own / without - 1 for without, own in zip(seconds["bare"], seconds["logged"], strict=True)]
    yield {"metrics": {"median": statistics.median(shares), "quartiles": statistics.quantiles(shares, n=4)[::2]}}


def growth(root: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds per token without attention, from T = 256 to 2048, and memory of the loss stage."""
    own = make_contenders(["ours-warm"], root / "growth", 8192)["ours-warm"]
    lengths = [64, 128] if arguments.quick else [256, 512, 1024, 2048]
    draw = random.Random(5)
    batches = {tokens: [pair(draw, tokens // 2, tokens // 2, tokens // 2, 8192)] for tokens in lengths}
    seconds: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    attention: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    for number in range(arguments.warm_up + max(3, arguments.steps // 3)):
        for tokens, pairs in batches.items():
            took, inside = own.step(pairs), attention_seconds(tokens)
            if number >= arguments.warm_up:
                seconds[tokens].append(took)
                attention[tokens].append(inside)
    rest = {t: statistics.median(seconds[t]) - statistics.median(attention[t]) for t in lengths}
    computed = {t: own.trainer.data_collator.tokens(pairs) for t, pairs in batches.items()}
    slope, fixed = statistics.linear_regression(list(computed.values()), list(rest.values()))
    yield {
        "growth": {
            "us_per_token_without_attention": {t: rest[t] / computed[t] * 1e6 for t in lengths},
            "line": {"fixed_ms": fixed * 1e3, "us_per_token": slope * 1e6},
            "off_the_line": {t: rest[t] / (fixed + slope * computed[t]) - 1 for t in lengths},
            "seconds": {tokens: statistics.median(values) for tokens, values in seconds.items()},
            "attention_seconds": {tokens: statistics.median(values) for tokens, values in attention.items()},
            "loss_stage_mib": {tokens: loss_stage(tokens, arguments.quick) for tokens in lengths},
        }
    }


def attention_seconds(tokens: int) -> float:
    """Forward, recompute and backward of all layers' attention for a pair of half prompt, on its own."""
    from dpo_plugin.compute.attention import PairSegments, shared_prefix_attention

    half = tokens // 2
    length = 3 * half
    segments = PairSegments([(half, half, half)], length, torch.device("cpu"))
    head = BODY["hidden_size"] // BODY["num_attention_heads"]
    heads = (BODY["num_attention_heads"], BODY["num_key_value_heads"], BODY["num_key_value_heads"])
    q, k, v = (torch.randn(1, count, length, head, requires_grad=True) for count in heads)
    module = torch.nn.Module()
    started = time.perf_counter()
    for _ in range(BODY["num_hidden_layers"]):
        with torch.no_grad():
            shared_prefix_attention(module, q, k, v, None, pair_segments=segments)
        shared_prefix_attention(module, q, k, v, None, pair_segments=segments)[0].sum().backward()
    return time.perf_counter() - started


def loss_stage(tokens: int, quick: bool) -> float:
    """MiB that scoring this many completion tokens takes at most, at the vocabulary of Qwen2.5."""
    from dpo_plugin.compute.lm_head import ForwardOptions, chunked_scores

    vocabulary = 2048 if quick else 152_064
    head = torch.nn.Linear(BODY["hidden_size"], vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(tokens, BODY["hidden_size"], requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))

    def score() -> None:
        scores = chunked_scores(head, hidden, labels, ForwardOptions(), False, vocabulary)
        scores[:, 0].sum().backward()

    score()
    return peak_growth(score)


def head(root: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both ways to exact gradients without keeping logits: each token's slope kept at forward, or chunks recomputed."""
    from dpo_plugin.compute.lm_head import ForwardOptions, chunked_scores

    for vocabulary, rows in [(2048, 64)] if arguments.quick else [(8192, 512), (152_064, 512)]:
        layer = torch.nn.Linear(BODY["hidden_size"], vocabulary, bias=False).requires_grad_(False)
        hidden = torch.randn(rows, BODY["hidden_size"], requires_grad=True)
        labels = torch.randint(vocabulary, (rows,))
        seconds: dict[str, list[float]] = {"slope kept": [], "recomputed": []}
        for _ in range(3 + arguments.steps // 3):
            for name, recompute in (("slope kept", False), ("recomputed", True)):
                started = time.perf_counter()
                chunked_scores(layer, hidden, labels, ForwardOptions(), recompute, vocabulary)[:, 0].sum().backward()
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values[3:]) for name, values in seconds.items()}
        yield {"head": {"vocabulary": vocabulary, "tokens": rows, "seconds": medians}}


def report(found: dict[str, Any]) -> str:
    """One measurement as a line or some."""
    if "growth" in found:
        return json.dumps(found["growth"], indent=1)
    if {"memory", "head", "metrics"} & found.keys():
        return json.dumps(found, indent=1)
    lines = [f"micro-batch {found['micro_batch']}, prompt share {found['prompt_share']}"]
    first = next(iter(found["contenders"]))
    for name, of in found["contenders"].items():
        low, high = of["ratio_quartiles"]
        lines.append(
            f"  {name:11} {of['pairs_per_s']:7.2f} pairs/s   {of['ratio']:.2f} × {first}"
            f"   (median of steps {of['ratio_median']:.2f}, quartiles {low:.2f} to {high:.2f})"
        )
    for name, to in (found["equality"] or {}).items():
        lines.append(f"  ours to {name}: max |Δ log-prob| {to['logps']:.1e}, Δ gradient {to['gradient']:.1e}")
    lines.append(f"  comparing the layouts takes {found['comparison_of_100_steps']:.2%} of 100 steps of ours")
    return "\n".join(lines)


def main() -> None:
    """Print each measurement as it comes, and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="counted steps")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the longer side")
    parser.add_argument(
        "--against", default="stock-nogc,stock,liger", help="rivals, the first being what ratios are to"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="dense", help="of the model that `speed` runs")
    parser.add_argument("--only", choices=["speed", "memory", "growth", "head", "metrics"])
    parser.add_argument("--case", nargs="+", help="speed cases to run: micro-batch,share, e.g. 1,0.5 4,mix")
    parser.add_argument("--quick", action="store_true", help="one share, small vocabulary: shows that it runs")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if unknown := set(arguments.against.split(",")) - RIVALS:
        parser.error(f"--against knows {', '.join(sorted(RIVALS))}; not {', '.join(sorted(unknown))}")
    arguments.against = distinct(arguments.against.split(","))
    logging.disable(logging.INFO)
    names = ("axolotl", "trl", "peft", "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    results: list[dict[str, Any]] = [{"versions": versions, "machine": machine}]
    print(json.dumps(results[0]))
    # axolotl 0.19 takes a base model with "mpt" in its path for an MPT (utils/schemas/validation.py:1569): /tmp/tmpt…
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as temporary:
        for job in (speed, memory, growth, head, metrics):
            if arguments.only in (None, job.__name__):
                for found in job(Path(temporary), arguments):
                    results.append(found)
                    print(report(found), flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
