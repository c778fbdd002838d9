"""Random configs with wrong values: each is read, refused by axolotl's schema, or refused in one line that says what to write.

``python -m tests.fuzz.configs --cases 12000`` runs many; tests/unit/test_raw_config.py runs a few.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel, ValidationError

from tests.support import tiny

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 2**70, 0.0, 0.5, -1.0, 1e-5, float("nan"), float("inf"), "", " ", "~", ".", "/",
    "..", "3", "1e-5", "-1", "auto", "true", "nope", "default", "dpo", "a/b", "/dev/null", "file.jsonl", "\x00", "é", "x" * 300,
    "a\nb", [], {}, [None], [3], ["user"], ["nope"], [[]], [{}], {"user": "human"}, {"user": ["human"]}, {"visitor": "usr"},
    {3: 4}, {"": ""}, {"stage": 3}, {"zero_optimization": 3}, {"zero_optimization": {"stage": "x"}}, {"path": "/"},
    [-1.0], [0.0], [1.0], ["sigmoid"], ["sigmoid", "sft"], b"bytes", {"a": {"b": {"c": []}}},
]  # fmt: skip


def keys_of(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def paths() -> list[tuple[Any, ...]]:
    """Every place of a config that is given a value: keys of axolotl, of its data sets and engines, and of our section."""
    from dpo_plugin.config import DPOPluginConfig
    from dpo_plugin.engines import config as engines_config
    from dpo_plugin.host import yaml_keys as raw_config

    top = [(key,) for key in keys_of(raw_config.RawConfig) if key != "base_model"]
    more = [("dpo_plugin",), ("fsdp",), ("trainer_cls",), ("resume_from_checkpoint",), ("excess_length_strategy",)]
    entry = [("datasets", 0, key) for key in [*keys_of(raw_config.DatasetEntry), "unknown"]]
    zero = [("deepspeed", "zero_optimization", key) for key in keys_of(engines_config.ZeroOptimization)]
    engines = [("deepspeed", key) for key in keys_of(engines_config.DeepSpeed)]
    engines += [("fsdp_config", key) for key in keys_of(raw_config.FSDP)]
    ours = [("dpo_plugin", key) for key in [*keys_of(DPOPluginConfig), "unknown"]]
    for name, field in DPOPluginConfig.model_fields.items():
        section = field.default_factory() if callable(field.default_factory) else None  # type: ignore[call-arg]
        ours += [("dpo_plugin", name, key) for key in (keys_of(type(section)) if section is not None else ["count"])]
    return top + more + entry + zero + engines + 2 * ours


def put(config: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set a value, where what is on the way is or can become a mapping; nothing is written to the root of the disk."""
    if path[-1] in ("output_dir", "dataset_prepared_path", "cache") and value in ("/", ".."):
        return
    for key in path[:-1]:
        if isinstance(config, dict) and not isinstance(config.get(key), dict | list):
            config[key] = {}
        if not (isinstance(config, dict) or (isinstance(config, list) and isinstance(key, int) and key < len(config))):
            return
        config = config[key]
    if isinstance(config, dict):
        config[path[-1]] = value


def good_values() -> list[tuple[tuple[Any, ...], Any]]:
    """Lines that our messages propose, which lead past the first check."""
    from dpo_plugin.config import DPOPluginConfig
    from dpo_plugin.host.yaml_keys import DatasetEntry, RawConfig

    left_alone = (
        "base_model",
        "base_model_config",
        "lora_model_dir",
        "datasets",
        "test_datasets",
        "path",
        "data_files",
    )
    owners = [((), RawConfig), (("datasets", 0), DatasetEntry), (("dpo_plugin",), DPOPluginConfig)]
    return [
        ((*owner, name), field.examples[0])
        for owner, model in owners
        for name, field in model.model_fields.items()
        if field.examples and name not in left_alone
    ]


def cases(seed: int, count: int, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of a good config with up to three other good values and one to three wrong ones."""
    draw, places, good = random.Random(seed), paths(), good_values()
    for _ in range(count):
        config = copy.deepcopy(base)
        for place, value in draw.sample(good, draw.choice((0, 1, 3))):
            put(config, place, copy.deepcopy(value))
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            value = copy.deepcopy(draw.choice(VALUES))
            put(config, draw.choice(places), draw.choice((value, value, value, [value], {"key": value}, str(value))))
        yield config


def check(config: dict[str, Any]) -> str:
    """What becomes of a config up to its data: read, refused by the host, or refused by us.

    Raises:
        AssertionError: If our message is too long, or does not end with what to write.
        Exception: Whatever ends bare.
    """
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from dpo_plugin.errors import ConfigError, DPOPluginError

    PluginManager.get_instance().plugins.clear()
    raw = DictDefault(config)
    try:
        if not isinstance(config.get("plugins"), list) or "dpo_plugin.DPOPlugin" not in config["plugins"]:
            from dpo_plugin.host.yaml_keys import typed

            typed(config)
            return "read"
        prepare_plugins(raw)
        cfg = validate_config(
            raw,
            {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"},
            {"torch_version": "2.13.0"},
        )
        cfg.batch_size = cfg.batch_size or cfg.micro_batch_size * cfg.gradient_accumulation_steps
        cfg.tokenizer_config = cfg.base_model
        PluginManager.get_instance().load_datasets(cfg)
    except DPOPluginError as error:
        text = str(error)
        assert len(text) < 500, text
        assert not isinstance(error, ConfigError) or re.search(r"Write[\w ,]*: [^\n]+$", text), text  # noqa: PT017
        return "refused"
    except ValidationError:
        return "host"
    except ValueError as error:
        if any(frame.name == "validate_config" for frame in traceback.extract_tb(error.__traceback__)):
            return "host"
        raise
    return "read"


def check_plan(config: dict[str, Any]) -> str:
    """The same of ``axolotl dpo plan``."""
    from dpo_plugin.errors import DPOPluginError
    from dpo_plugin.host.yaml_keys import typed
    from dpo_plugin.plan.planner import GIB, Machine, Planner

    try:
        Planner(typed(config), "config.yaml", Machine(2, 80 * GIB, 500 * GIB)).result()
    except DPOPluginError as error:
        text = str(error)
        assert len(text) < 500, text
        assert re.search(r"Write[\w ,]*: [^\n]+$", text), text
        return "refused"
    return "read"


def good_config(folder: Path) -> dict[str, Any]:
    """A config that is read, on a tiny base and adapter and three rows."""
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.jsonl", [tiny.chat_row("q", f"good {n}", f"bad {n}") for n in range(3)])
    data = [{"path": str(rows), "ds_type": "json", "type": "dpo_plugin.chat"}]
    adapter = str(tiny.save_adapter(base, folder / "sft"))
    return tiny.dpo_config(base, folder / "out", datasets=data, lora_model_dir=adapter)


def run(
    seed: int, count: int, folder: Path, check: Callable[[dict[str, Any]], str] = check
) -> tuple[Counter[str], list[tuple[dict[str, Any], BaseException]]]:
    """Outcomes, and the configs that ended bare."""
    good, outcomes, bare = good_config(folder), Counter[str](), []
    tokenizer = tiny.tokenizer()
    (folder / "here").mkdir()  # relative folders of the configs are made in it
    with (
        contextlib.chdir(folder / "here"),
        mock.patch("dpo_plugin.host.datasets.load_tokenizer", return_value=tokenizer),
    ):
        for config in cases(seed, count, good):
            try:
                outcomes[check(config)] += 1
            except Exception as error:
                outcomes["bare"] += 1
                bare.append(({key: value for key, value in config.items() if value != good.get(key)}, error))
    return outcomes, bare


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", action="store_true", help="axolotl dpo plan instead of a run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        outcomes, bare = run(asked.seed, asked.cases, Path(made), check_plan if asked.plan else check)
    kinds = Counter((type(error).__name__, traceback.extract_tb(error.__traceback__)[-1].name) for _, error in bare)
    for config, error in bare[:40]:
        print(str(config)[:200], "→", f"{type(error).__name__}: {error}"[:300])
    print(kinds.most_common())
    print(dict(outcomes))
    sys.exit(bool(bare))
