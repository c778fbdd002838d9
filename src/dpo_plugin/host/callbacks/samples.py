"""Samples during training: when, of which prompts, and where to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from dpo_plugin.config import SamplesConfig
from dpo_plugin.engines.ranks import gather_object
from dpo_plugin.errors import ConfigError, ScorerError
from dpo_plugin.host.batches import decide_layout, named_datasets
from dpo_plugin.host.callbacks import RunningTrainer
from dpo_plugin.host.log import LOG, may_fail
from dpo_plugin.host.templates import (
    KEY,
    check_rendered_as_trained,
    refusal,
    render_prompt,
    renderer_of,
    scorer_of,
)
from dpo_plugin.report.run_folder import SAMPLES
from dpo_plugin.samples import records
from dpo_plugin.samples.generate import AnswerOptions, Sampler
from dpo_plugin.samples.prompts import prompts_of_pairs, read_prompts
from dpo_plugin.samples.scorers import CheckedScorer
from dpo_plugin.samples.win_rate import WinRate, divergence, scored

WIN_RATE = "samples/win_rate"


def tokenized_prompts(trainer: RunningTrainer, settings: SamplesConfig) -> list[tuple[list[int], Mapping[str, Any]]]:
    """Tokenise the prompts that the section ``samples`` asks for, each with its line of the prompts file.

    Raises:
        ConfigError: If a prompt cannot be rendered, or there is no evaluation data.
    """
    datasets = trainer.settings.datasets
    if settings.prompts != "eval":
        found = read_prompts(settings.prompts, KEY)
        renderer = renderer_of(trainer.settings.template, datasets[0], trainer.processing_class, True)
        plain = datasets[0].get("type") == "dpo_plugin.text"
        if not (plain and all(isinstance(prompt.content, str) for prompt in found)):
            check_rendered_as_trained(islice(trainer.train_dataset, 8), renderer, settings.prompts)
        where = f"`{KEY}: {settings.prompts}`"
        return [(render_prompt(prompt, renderer, plain, where), prompt.row) for prompt in found]
    evaluation = (data for name, data in named_datasets(trainer) if name.startswith("evaluation"))
    prompts = prompts_of_pairs(chain.from_iterable(evaluation), settings.count)
    if not prompts:
        raise ConfigError(f"`{KEY}: eval` finds no evaluation data. Write: prompts: <file>")
    return [(ids, {}) for ids in prompts]


def make_sampler(trainer: RunningTrainer, settings: SamplesConfig, seed: int) -> Sampler:
    """Make a sampler of a trainer's policy and reference."""
    tokenizer = trainer.processing_class
    options = AnswerOptions(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=_stop_ids(trainer),
        pad_token_id=tokenizer.pad_token_id,
        temperature=settings.temperature,
        seed=seed,
    )
    decide_layout(trainer)
    flat, chunk = trainer.data_collator.flat, trainer.settings.config.compute.logits_chunk
    return Sampler(trainer.reference.strategy, tokenizer, options, trainer.args.beta, flat, chunk)


def _stop_ids(trainer: RunningTrainer) -> tuple[int, ...]:
    """Collect what ends an answer: the end tokens of tokenizer and model, and the last tokens of the data's answers."""
    own = getattr(trainer.model.generation_config, "eos_token_id", None)
    found = {trainer.processing_class.eos_token_id, *(own if isinstance(own, list) else [own])}
    for _, data in named_datasets(trainer):
        found |= {row["chosen_ids"][-1] for row in islice(data, 1)}
    return tuple(sorted(found - {None}))


# ── during training ──


class SamplesCallback(TrainerCallback):  # type: ignore[misc]
    """Sends answers of policy and reference to console, file and trackers, every so many steps and at the last.

    The main process does it alone, on the unwrapped model; other ranks wait in their next exchange.
    """

    def __init__(self, trainer: RunningTrainer, settings: SamplesConfig):
        self.trainer = trainer
        self.settings = settings
        self._scorer = scorer_of(trainer.settings.config)
        self._prompts: list[tuple[list[int], Mapping[str, Any]]] = []
        self._last: int | None = None
        self._win_rate: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prepare the prompts."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled:  # by accelerate's own settings; the YAML's are refused before weights are read
            raise refusal("FSDP")
        self._last = state.global_step
        self._prompts = tokenized_prompts(trainer, self.settings)
        if state.is_world_process_zero:
            with may_fail(Path(args.output_dir) / SAMPLES):
                records.keep_until(Path(args.output_dir) / SAMPLES, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take samples if they are due; the last before trackers close."""
        if state.global_step % self.settings.every_steps == 0 or state.global_step >= state.max_steps:
            self._take(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Add the win rate of now to an evaluation during training, so that it can choose the best model."""
        if self._scorer is None or self._last is None or metrics is None:
            return
        self._take(args, state)
        rate = gather_object(self._win_rate)[0]  # of the rank that answered
        if rate is not None:
            metrics[f"eval_{WIN_RATE}"] = rate

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take samples of a run that was stopped early."""
        self._take(args, state)

    def _take(self, args: Any, state: Any) -> None:
        due, self._last = state.global_step != self._last, state.global_step
        if not due or not state.is_world_process_zero:
            return
        trainer = self.trainer
        sampler = make_sampler(trainer, self.settings, seed=args.seed + state.global_step)
        with trainer.accelerator.autocast():
            samples = sampler(trainer.model, [ids for ids, _ in self._prompts], state.global_step)
        title = f"dpo_plugin: samples at step {state.global_step}"
        if self.settings.temperature == 1:
            trainer.recorder.note({"samples/divergence": divergence(samples, args.beta)})
        if self._scorer is not None:
            samples, note = self._judged(samples, self._scorer, args.metric_for_best_model)
            title += note
        file = Path(args.output_dir) / SAMPLES
        with may_fail(file):
            records.append_samples(file, samples)
        Console().print(records.samples_table(samples, title))
        send_to_trackers(trainer.callback_handler.callbacks, samples, state.global_step)

    def _judged(
        self, samples: list[records.Sample], scorer: CheckedScorer, best: str | None
    ) -> tuple[list[records.Sample], str]:
        """Score samples. A scorer that fails, such as a server that is away, costs these scores and not the run.

        Raises:
            ScorerError: If the scorer fails and its win rate chooses the best model.
        """
        self._win_rate = None
        try:
            samples = scored(samples, [row for _, row in self._prompts], scorer)
        except ScorerError as error:
            if best is not None and best.removeprefix("eval_") == WIN_RATE:
                raise
            LOG.warning(f"dpo_plugin: training goes on, but these samples have no scores: {error}")
            return samples, ""
        return samples, self._note(samples)

    def _note(self, samples: Sequence[records.Sample]) -> str:
        """Put the win rate into the next line of the log; returns it as text."""
        self.trainer.recorder.note({"samples/score": mean(sample.policy.score or 0.0 for sample in samples)})
        found = WinRate.of(samples)
        if found is None:
            return ""
        self._win_rate = found.rate
        self.trainer.recorder.note({WIN_RATE: found.rate})
        return f": {found}"


def send_to_trackers(callbacks: Sequence[Any], samples: Sequence[records.Sample], step: int) -> None:
    """Show samples in Weights & Biases and TensorBoard, through those of their callbacks that are set up."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("samples", records.samples_markdown(samples), step)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
            table = callback._wandb.Table(columns=list(records.COLUMNS), data=[sample.row() for sample in samples])
            callback._wandb.log({"samples": table, "train/global_step": step})
