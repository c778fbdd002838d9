"""``axolotl dpo compare``: what a finished run changed, from one load of the base model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from axolotl.cli.config import gpu_capabilities, plugin_set_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import setup_model_and_tokenizer, setup_reference_model
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import setup_trainer

from dpo_plugin.config import parse_config
from dpo_plugin.errors import CheckpointError, ConfigError
from dpo_plugin.host import datasets as host_datasets
from dpo_plugin.host.callbacks.progress import Progress
from dpo_plugin.host.callbacks.samples import make_sampler, tokenized_prompts
from dpo_plugin.host.commands.config_file import load_config, on_one_process, trained_folder
from dpo_plugin.host.output_dir.checkpoints import read_marker
from dpo_plugin.host.output_dir.resume import REFERENCE_STATE, load_reference
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.host.templates import scorer_of
from dpo_plugin.host.yaml_keys import read_yaml
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.samples.prompts import read_prompts
from dpo_plugin.samples.records import Sample, samples_table
from dpo_plugin.samples.win_rate import Judged, judged_table, scored


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a policy on held-out pairs.

    Attributes:
        accuracy: Share of pairs whose chosen reward is above the rejected one.
        margin: Mean of chosen's reward minus rejected's.
        pairs: How many pairs.
    """

    accuracy: float
    margin: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        policy: Folder of the policy.
        reference: Strategy and identity of the reference.
        note: What the reader has to know of the reference, or None.
        samples: Answers.
        held_out: Of all held-out pairs, or None if there are none.
        by_source: The same by source.
        win_rates: Temperature → how often the policy's answer has the higher score, and KL(π ‖ π_ref) in nats per token
            where that is estimated, at temperature 1; empty without a scorer.
    """

    policy: str
    reference: str
    note: str | None
    samples: Sequence[Sample]
    held_out: Figures | None
    by_source: Mapping[str, Figures]
    win_rates: Mapping[float, Judged] = field(default_factory=dict)

    def parts(self) -> list[Any]:
        """Texts and tables for the terminal."""
        from rich.table import Table
        from rich.text import Text

        head = [f"policy: {self.policy}", f"reference: {self.reference}", *([self.note] if self.note else [])]
        answers = samples_table(self.samples, "Answers")
        if self.win_rates:
            head.append(judged_table(self.win_rates))
        if self.held_out is None:
            return [*head, answers, "no held-out data: the config has neither test_datasets nor val_set_size"]
        table = Table("held-out", "accuracy", "margin", "pairs", title="Held-out pairs")
        for name, figures in {"all": self.held_out, **self.by_source}.items():
            table.add_row(Text(name), f"{figures.accuracy:.3f}", f"{figures.margin:+.3f}", str(figures.pairs))
        return [*head, answers, table]


def compare(
    config: str | Path,
    prompts: str | None = None,
    checkpoint: str | None = None,
    scorer: str | None = None,
    temperatures: Sequence[float] = (),
) -> Comparison:
    """Compare the policy that a config has trained with its reference: their answers, and figures of held-out pairs.

    Args:
        config: The config of the run; what splits the model over ranks in it is left out.
        prompts: A file of prompts; by default those of the section ``samples``, else of the evaluation data.
        checkpoint: Folder of the policy; by default ``output_dir``.
        scorer: The scorer that judges the answers; by default that of the section ``samples``, if any.
        temperatures: More temperatures at which answers are judged.

    Raises:
        DPOPluginError: If the policy, the reference or the prompts are missing, before a model is loaded.
    """
    if prompts is not None:
        read_prompts(prompts, "--prompts")
    raw = _raw_config(Path(config), prompts, scorer)
    folder = _policy_folder(raw, checkpoint)
    cfg, settings = load_config(raw, gpu_capabilities())
    if cfg.adapter:
        settings = replace(settings, policy=AdapterFolder.open(folder, "--checkpoint"))
    if settings.reference.strategy.moves and not (folder / REFERENCE_STATE).is_file():
        raise CheckpointError(
            f"the reference of the strategy {settings.reference.name!r} moves in training, and {folder} does not hold "
            f"it ({REFERENCE_STATE}); checkpoints do. Write: --checkpoint {cfg.output_dir}/checkpoint-<step>"
        )
    DPOPlugin.active().settings = settings
    plugin_set_cfg(cfg)
    if temperatures and scorer_of(settings.config) is None:
        raise ConfigError("--temperature is for answers that are judged. Write: --scorer rule")
    trainer = run_trainer(cfg, settings, folder)
    load_reference(trainer.reference.strategy, folder)
    return _measure(trainer, settings, folder, temperatures)


def _raw_config(path: Path, prompts: str | None, scorer: str | None) -> dict[str, Any]:
    """Read the YAML for one process, with a section ``samples``."""
    raw = on_one_process(read_yaml(path))
    section = raw.get("dpo_plugin") or {}
    parse_config(section)
    options = {"prompts": prompts, "scorer": scorer}
    samples = (section.get("samples") or {}) | {key: given for key, given in options.items() if given is not None}
    return {**raw, "dpo_plugin": {**section, "samples": samples}}


def _policy_folder(raw: Mapping[str, Any], checkpoint: str | None) -> Path:
    folder = trained_folder(raw, checkpoint)
    if folder is None:
        file = "adapter_config.json" if raw.get("adapter") else "config.json"
        raise ConfigError(
            f"`axolotl dpo compare` needs the trained policy, and `output_dir: {raw.get('output_dir')}` holds no "
            f"{file}. Train first, or write: --checkpoint <folder>"
        )
    return folder


def run_trainer(cfg: Any, settings: RunSettings, policy: Path | None = None) -> Any:
    """Build the run's own trainer, with the base model loaded once; in full fine-tuning, policy and base.

    Args:
        cfg: The host's config, for one process.
        settings: The run's settings, those that the plugin has.
        policy: In full fine-tuning, the folder of the policy, or None for the base.
    """
    with tempfile.TemporaryDirectory() as elsewhere:  # the audit in output_dir stays that of the training
        data = host_datasets.load_datasets(DictDefault({**cfg, "output_dir": elsewhere}), settings)
    data = data or load_preference_datasets(cfg=cfg)
    of_policy = copy.deepcopy(cfg)
    if not cfg.adapter and policy is not None:
        of_policy.base_model = of_policy.base_model_config = str(policy)
    model, tokenizer, peft_config, processor = setup_model_and_tokenizer(of_policy)
    trainer = setup_trainer(
        cfg=cfg,
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        total_num_steps=data.total_num_steps,
        model_ref=setup_reference_model(cfg, tokenizer, processor),
        peft_config=peft_config,
    )
    trainer.remove_callback(Progress)  # its line does not belong in what is printed
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # places it, as `Trainer.evaluate` does
    trainer.model.eval()
    return trainer


def _measure(trainer: Any, settings: RunSettings, folder: Path, temperatures: Sequence[float]) -> Comparison:
    samples, scorer = settings.config.samples, scorer_of(settings.config)
    assert samples is not None
    prompts = tokenized_prompts(trainer, samples)

    def answered(temperature: float) -> list[Sample]:
        sampler = make_sampler(trainer, samples.model_copy(update={"temperature": temperature}), trainer.args.seed)
        with trainer.accelerator.autocast():
            found = sampler(trainer.model, [ids for ids, _ in prompts])
        return found if scorer is None else scored(found, [row for _, row in prompts], scorer)

    all_temperatures = dict.fromkeys((samples.temperature, *temperatures))
    by_temperature = {temperature: answered(temperature) for temperature in all_temperatures}
    judged = {one: Judged.of(found, one, trainer.args.beta) for one, found in by_temperature.items()}
    found = held_out(trainer.evaluate()) if trainer.eval_dataset is not None else {}
    facts = dict(trainer.origin.reference)
    made_with = (read_marker(folder) or {}).get("reference", facts)
    another = f"note: the policy was trained against another reference: {' '.join(made_with.values())}"
    return Comparison(
        policy=str(folder),
        reference=" ".join(facts.values()),
        note=another if made_with != facts else None,
        samples=by_temperature[samples.temperature],
        held_out=found.pop("", None),
        by_source=found,
        win_rates={temperature: found for temperature, found in judged.items() if found is not None},
    )


def held_out(metrics: Mapping[str, float]) -> dict[str, Figures]:
    """Collect from logged metrics the figures of the evaluation pairs: under "" of all, and by source if several."""
    count = "eval_rewards/count"
    sources = {name.removeprefix(count).removeprefix("/"): name for name in metrics if name.startswith(count)}
    return {
        source: Figures(
            metrics[name.replace("count", "accuracies", 1)],
            metrics[name.replace("count", "margins", 1)],
            int(metrics[name]),
        )
        for source, name in sources.items()
    }
