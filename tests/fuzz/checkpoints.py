"""Damaged checkpoints, adapters and caches: each is passed over, rebuilt or refused by name, and never used wrong.

The functions that the start of a run calls are called, on folders of a run's shape; nothing is trained.
`python -m tests.fuzz.checkpoints --cases 2000` runs the whole campaign.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_plugin.compute.batching import row_hash
from dpo_plugin.errors import AdapterError, CheckpointError, DPOPluginError
from dpo_plugin.host.output_dir.checkpoints import Origin, checkpoint_to_resume, file_digests, write_marker
from dpo_plugin.model.adapter_config import AdapterFolder, adapter_facts
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel, adapter_tensors, attach
from dpo_plugin.model.cache import ReferenceLogpCache

KEYS = [row_hash([1, 2], [3], [n]) for n in range(40)]
VALUES = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * -50


@dataclass(frozen=True)
class Case:
    """One damage.

    Attributes:
        target: What is damaged: checkpoint, adapter, or cache.
        file: Which file of it.
        seed: Draws the damage.
    """

    target: str
    file: str
    seed: int


def cases(seed: int, count: int) -> Iterator[Case]:
    """Cases in equal shares over all files that a start of a run reads."""
    draw = random.Random(seed)
    files = [
        *(("checkpoint", name) for name in CHECKPOINT_FILES),
        ("checkpoint", "dpo_plugin.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
        ("cache", "a.logps"),
        ("cache", "a.logps"),
    ]
    for number in range(count):
        yield Case(*files[number % len(files)], seed=draw.randrange(2**32))


# ── damage ──


def damage(file: Path, draw: random.Random) -> str:
    """Damage a file in place.

    Returns:
        What was done.
    """
    kind = draw.choice([*_DAMAGES, *(_JSON_DAMAGES if file.suffix == ".json" else {})])
    {**_DAMAGES, **_JSON_DAMAGES}[kind](file, draw)
    return kind


def _bytes(change: Callable[[bytearray, random.Random], bytearray]) -> Callable[[Path, random.Random], None]:
    def apply(file: Path, draw: random.Random) -> None:
        file.write_bytes(change(bytearray(file.read_bytes()), draw))

    return apply


def _flip(content: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice([1, 1, 4, 64])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def _overwrite(content: bytearray, draw: random.Random) -> bytearray:
    begin = draw.randrange(len(content))
    length = min(len(content) - begin, draw.choice([1, 16, 512]))
    content[begin : begin + length] = draw.choice([bytes(length), draw.randbytes(length)])
    return content


def _as_folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped": _bytes(_flip),
    "overwritten": _bytes(_overwrite),
    "cut off": _bytes(lambda content, draw: content[: draw.randrange(len(content))]),
    "longer": _bytes(lambda content, draw: content + draw.randbytes(draw.randrange(1, 99))),
    "a piece lost": _bytes(lambda content, draw: content[: (at := draw.randrange(len(content)))] + content[at + 7 :]),
    "noise": _bytes(lambda content, draw: bytearray(draw.randbytes(len(content)))),
    "empty": _bytes(lambda content, draw: bytearray()),
    "missing": lambda file, draw: file.unlink(),
    "a folder": _as_folder,
}

ODD: list[Any] = [
    None, True, False, 0, -1, 3, 8, 17, 2.5, float("nan"), float("inf"), 10**400, "", "x", "8", [], [3], ["x"], {},
    {"x": 1}, {"q_proj": 2}, {"q_proj": "x"}, [[]], "*", "(", "LORA", "lora",
]  # fmt: skip


def _odd_value(file: Path, draw: random.Random) -> None:
    content = json.loads(file.read_text())
    content[draw.choice(sorted(content))] = draw.choice(ODD)
    file.write_text(json.dumps(content))


def _key_renamed(file: Path, draw: random.Random) -> None:
    content = json.loads(file.read_text())
    key = draw.choice(sorted(content))
    content[draw.choice([key[:-1] + "_", key.upper(), f"{key}s"])] = content.pop(key)
    file.write_text(json.dumps(content))


def _key_lost(file: Path, draw: random.Random) -> None:
    content = json.loads(file.read_text())
    del content[draw.choice(sorted(content))]
    file.write_text(json.dumps(content))


_JSON_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "an odd value": _odd_value,
    "a key renamed": _key_renamed,
    "a key lost": _key_lost,
    "another kind": _bytes(lambda content, draw: bytearray(json.dumps(draw.choice(ODD)).encode())),
    "nested": _bytes(lambda content, draw: bytearray(b"[" * 100_000)),
}


# ── what is damaged ──

CHECKPOINT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
TARGETS = ["q_proj", "v_proj"]


def base() -> Qwen2ForCausalLM:
    """A base model so small that a thousand adapters are attached in a minute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


def answer(model: PolicyReferenceModel) -> torch.Tensor:
    """The reference's logits."""
    with torch.no_grad(), model.reference_active():
        return model(torch.arange(12)[None]).logits


class Bench:
    """Whole folders that are copied for each case."""

    def __init__(self, folder: Path):
        from peft import LoraConfig, get_peft_model

        self.folder, self.base = folder, base()
        settings = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"v_proj": 16}}
        config = LoraConfig(**settings, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(self.base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        self.adapter = folder / "adapter"
        model.save_pretrained(str(self.adapter))
        attached = self._attach(self.adapter)
        facts = adapter_facts(attached.peft_config[POLICY].to_dict(), adapter_tensors(attached, POLICY))
        self.identity, self.logits = attached.digests[REFERENCE], answer(attached)
        self.origin = Origin({"strategy": "adapter", "identity": self.identity}, "b" * 64, facts)
        self.cache = folder / "cache"
        cache = ReferenceLogpCache(self.cache, "a" * 64)
        cache.put(KEYS, VALUES)
        cache.flush()
        next(self.cache.rglob("*.logps")).rename(self.cache / ("a" * 32) / "a.logps")
        self.output = folder / "output"
        for step in (2, 4):
            self._save_checkpoint(step)

    def _attach(self, adapter: Path) -> PolicyReferenceModel:
        opened = AdapterFolder.open(adapter, "lora_model_dir")
        return attach(copy.deepcopy(self.base), opened, opened)

    def _save_checkpoint(self, step: int) -> None:
        folder = self.output / f"checkpoint-{step}"
        shutil.copytree(self.adapter, folder)
        parameters = [torch.nn.Parameter(value) for value in load_file(folder / "adapter_model.safetensors").values()]
        optimizer = torch.optim.AdamW(parameters)
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict(), folder / "scheduler.pt")
        torch.save({"cpu": torch.random.get_rng_state()}, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
        write_marker(folder, self.origin, file_digests(folder))

    def check(self, case: Case) -> str:
        """Run a case.

        Returns:
            What became of it and by which damage.

        Raises:
            Exception: If it ends bare, or is used wrong.
        """
        draw = random.Random(case.seed)
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        try:
            return getattr(self, f"_{case.target}")(case, place, draw)
        except Exception as error:
            error.add_note(repr(case))
            raise

    def _checkpoint(self, case: Case, place: Path, draw: random.Random) -> str:
        shutil.copytree(self.output, place)
        newest = place / "checkpoint-4"
        before = (newest / case.file).read_bytes()
        done = damage(newest / case.file, draw)
        unchanged = (newest / case.file).is_file() and (newest / case.file).read_bytes() == before
        named: str | None
        try:
            named = checkpoint_to_resume(str(newest), True, place, self.origin)
        except CheckpointError:
            named = None
        assert (named == str(newest)) == unchanged, f"{done}: named"
        try:
            found = checkpoint_to_resume(True, False, place, self.origin)
        except CheckpointError as error:
            return self._refused(error, case.file == "dpo_plugin.json" and done == "missing")
        assert found == str(place / f"checkpoint-{4 if unchanged else 2}"), done
        return "unchanged" if unchanged else "older taken"

    def _adapter(self, case: Case, place: Path, draw: random.Random) -> str:
        shutil.copytree(self.adapter, place)
        done = damage(place / case.file, draw)
        try:
            attached = self._attach(place)
        except AdapterError as error:
            return self._refused(error)
        logits = answer(attached)
        same = torch.equal(logits, self.logits)
        assert same or attached.digests[REFERENCE] != self.identity, f"{done}: another function under the same identity"
        if not logits.isfinite().all():
            return "another identity, and too large: the first step stops with NotFiniteError"
        return "the same" if same else "another identity, so nothing kept or trained with it is used"

    @staticmethod
    def _refused(error: DPOPluginError, rightly: bool = True) -> str:
        assert rightly, error
        assert len(str(error)) < 500, f"{len(str(error))} characters: {error}"
        return "refused"

    def _cache(self, case: Case, place: Path, draw: random.Random) -> str:
        shutil.copytree(self.cache, place)
        damage(place / ("a" * 32) / case.file, draw)
        cache = ReferenceLogpCache(place, "a" * 64)
        left = [n for n, key in enumerate(KEYS) if key in cache]
        if left:
            assert torch.equal(cache.get([KEYS[n] for n in left]), VALUES[left]), "used wrong"
        missing = [n for n in range(len(KEYS)) if n not in left]
        cache.put([KEYS[n] for n in missing], VALUES[missing])
        cache.flush()
        assert torch.equal(ReferenceLogpCache(place, "a" * 64).get(KEYS), VALUES)
        return "rebuilt" if missing else "unchanged"


def campaign(seed: int, count: int) -> Counter[str]:
    """Run cases; returns how many ended how."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for case in cases(seed, count):
            outcomes[f"{case.target} {case.file}: {bench.check(case)}"] += 1
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=int(os.environ.get("FUZZ_CASES", "2000")))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for outcome, number in sorted(campaign(arguments.seed, arguments.cases).items()):
        print(f"{number:6d}  {outcome}")
