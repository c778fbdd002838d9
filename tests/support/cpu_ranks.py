"""Real ranks on a machine without GPUs: gloo processes that run axolotl's own path under DDP, FSDP2 and DeepSpeed.

axolotl, accelerate and transformers take CUDA for granted once there is more than one rank. `CPURanks` is an axolotl
plugin, for tests alone, that patches those places in the ranks' own processes and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from axolotl.integrations.base import BasePlugin
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from dpo_plugin.engines.sharded import full_tensor, gather_policy, gathered
from dpo_plugin.model.adapters import PolicyReferenceModel, adapter_tensors
from tests.support.forked import run_ranks
from tests.support.tiny import ROOT

PLUGINS = ["tests.support.cpu_ranks.CPURanks", "dpo_plugin.DPOPlugin"]


Put = Callable[[Any, str, Any], None]
"""`setattr`, or a monkeypatch's, which undoes it."""


class CPURanks(BasePlugin):
    """Let ranks live on the CPU; must stand before other plugins."""

    def register(self, cfg: Any) -> None:
        patch_accelerate(bool(cfg.get("deepspeed")), bool(cfg.get("fsdp_config")))
        patch_axolotl()
        if cfg.get("deepspeed"):
            patch_deepspeed()
        allow_bf16()

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [Recorder(trainer) if isinstance(trainer.model, PolicyReferenceModel) else LogRecorder()]


def patch_accelerate(deepspeed: bool, fsdp: bool) -> None:
    """Backend gloo and device cpu. As FSDP and DeepSpeed are entered through types of their own, only DDP is MULTI_CPU.

    ACCELERATE_USE_CPU would do the same, and drop FSDP and DeepSpeed without a word.
    """
    import torch
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import DistributedType, PartialState

    kind = DistributedType.NO if deepspeed else DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU
    build_device_mesh = ParallelismConfig.build_device_mesh

    def prepare_backend(self: Any, *_: Any, **__: Any) -> tuple[str | None, Any]:
        return ("gloo", kind) if "LOCAL_RANK" in os.environ else (None, DistributedType.NO)

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    ParallelismConfig.build_device_mesh = lambda self, device_type: build_device_mesh(self, "cpu")


def patch_axolotl() -> None:
    """Load quantised models on the CPU, where axolotl names the rank's GPU, and warm up no CUDA allocator.

    And do not ask GPUs whether they reach each other: a CUDA build of torch looks for a driver then.
    """
    import axolotl.utils.trainer
    import transformers.modeling_utils
    from axolotl.loaders.model import ModelLoader

    load = ModelLoader._load_model_from_pretrained

    def load_on_cpu(self: Any, *args: Any) -> Any:
        if isinstance(self.model_kwargs.get("device_map"), dict):
            self.model_kwargs["device_map"] = {"": "cpu"}
        return load(self, *args)

    ModelLoader._load_model_from_pretrained = load_on_cpu
    transformers.modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True


def patch_deepspeed() -> None:
    """Gather parameters one by one, and without autograd.

    DeepSpeed 0.18.9 starts the gathers of several parameters and waits for the last (zero/partition_parameters.py:1983).
    NCCL completes them in order; gloo does not, and a late one overwrites what has been loaded meanwhile. Its ZeRO-2
    gathers updated weights under autograd (zero/stage_1_and_2.py:2205), of which gloo splits the output.
    """
    import torch
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.runtime.zero.partition_parameters import Init

    def one_by_one(self: Any, parameters: list[Any], hierarchy: Any = 0, quantize: bool = False) -> None:
        self._allgather_params_sequential(parameters, hierarchy)

    Init._allgather_params_coalesced = one_by_one
    stage_1_and_2.all_gather_dp_groups = torch.no_grad()(stage_1_and_2.all_gather_dp_groups)


def allow_bf16(put: Put = setattr) -> None:
    """Let ``bf16: true`` pass on a CPU."""
    import transformers.training_args
    import transformers.utils.import_utils

    for module in (transformers.training_args, transformers.utils.import_utils):
        put(module, "is_torch_bf16_gpu_available", lambda: True)


class LogRecorder(TrainerCallback):
    """Writes the log."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (records(args.output_dir) / "log_history.json").write_text(json.dumps(state.log_history))


class Recorder(LogRecorder):
    """Writes what only the ranks can see: the log, the adapters made whole, and what the engine optimises."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.facts: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        names = {id(parameter): name for name, parameter in self.trainer.model.named_parameters()}
        parameters, masters = optimised(self.trainer)
        self.facts["optimised"] = sorted(names[id(parameter)] for parameter in parameters)
        self.facts["masters"] = sorted({str(master.dtype) for master in masters})
        self.facts["buffers_at_start"] = self._buffers()
        policy = {name.replace(".default.", "."): value for name, value in gather_policy(self.trainer.model).items()}
        self._write(policy, "policy_at_start", args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.facts["buffers_at_end"] = self._buffers()
        self.facts["policy_dtype"] = str(next(self.trainer.model.policy_parameters())[1].dtype)
        if self.trainer.model.has_reference:
            self._write(whole_reference(self.trainer.model), "reference_at_end", args, state)
        super().on_train_end(args, state, control)
        if state.is_world_process_zero:
            (records(args.output_dir) / "facts.json").write_text(json.dumps(self.facts))

    def _buffers(self) -> list[str]:
        return sorted({str(buffer.dtype) for buffer in self.trainer.model.buffers()})

    def _write(self, tensors: dict[str, Any], file: str, args: Any, state: Any) -> None:
        if state.is_world_process_zero:
            save_file(tensors, records(args.output_dir) / f"{file}.safetensors")


def whole_reference(model: Any) -> dict[str, Any]:
    """The reference adapter under the keys of its file."""
    with gathered(model.parameters()):
        return {key: full_tensor(value).clone() for key, value in sorted(adapter_tensors(model, "reference").items())}


def records(output_dir: str | Path) -> Path:
    """The folder beside the output in which a run is recorded."""
    folder = Path(output_dir).parent / "records"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def optimised(trainer: Any) -> tuple[list[Any], list[Any]]:
    """The model's parameters that the optimizer updates, and the tensors in which it does so."""
    if trainer.is_deepspeed_enabled:
        optimizer = trainer.model_wrapped.optimizer
        if hasattr(optimizer, "bit16_groups"):  # ZeRO stages 1 and 2
            return [p for group in optimizer.bit16_groups for p in group], optimizer.single_partition_of_fp32_groups
        return [p for group in optimizer.fp16_groups for p in group], optimizer.fp32_partitioned_groups_flat
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return parameters, parameters


@dataclass
class RankRun:
    """A finished run of several ranks."""

    output_dir: Path
    returncode: int
    output: str

    @property
    def history(self) -> list[dict[str, Any]]:
        return json.loads((records(self.output_dir) / "log_history.json").read_text())

    def recorded(self, name: str) -> dict[str, Any]:
        """An adapter as it was at that moment."""
        return load_file(records(self.output_dir) / f"{name}.safetensors")

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((records(self.output_dir) / "facts.json").read_text())

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [line for line in self.history if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.history if "eval_loss" in line]

    def error(self) -> str:
        """The first traceback, or the end of the output."""
        found = re.search(r"^(\[rank\d\]: )?Traceback .*?^(\[rank\d\]: )?[\w.]*Error.*?$", self.output, re.M | re.S)
        return found[0][-3000:] if found else self.output[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(file: Path, ranks: int) -> list[str]:
    """axolotl's own way to several processes."""
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [
        tool("axolotl"),
        "train",
        str(file),
        "--launcher",
        "torchrun",
        "--",
        "--nproc_per_node",
        str(ranks),
        *rendezvous,
    ]


def tool(name: str) -> str:
    """A command of this Python's environment."""
    return str(Path(sys.executable).with_name(name))


def launch(
    config: dict[str, Any],
    folder: Path,
    ranks: int = 2,
    timeout: float = 300,
    more_plugins: tuple[str, ...] = (),
    plugins: list[str] = PLUGINS,
    command: Callable[[Path, int], list[str]] | None = None,
    **engine_env: str,
) -> RankRun:
    """Train with gloo ranks of one thread each, forked or started by a command, and wait for it."""
    file = write_config({**config, "plugins": [*plugins, *more_plugins]}, folder)
    environment = {**clean_environment(bool(config.get("deepspeed"))), **engine_env}
    if command:
        return RankRun(Path(config["output_dir"]), *run_group(command(file, ranks), environment, timeout))
    return RankRun(Path(config["output_dir"]), *run_ranks(file, ranks, free_port(), environment, timeout))


def write_config(config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def clean_environment(deepspeed: bool) -> dict[str, str]:
    """This process's environment without what another launcher left in it, for ranks of one thread."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    left = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_")) and k not in launchers}
    return {
        **left,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [left.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        **({"DS_ACCELERATOR": "cpu"} if deepspeed else {}),
    }


def run_group(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str]:
    """Run a command; past the time limit it is killed with all that it started, ranks that hang among them."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)  # torchrun gives each rank a session of its own
        for one in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        output, _ = process.communicate()
        return 124, output
    return process.returncode, output
