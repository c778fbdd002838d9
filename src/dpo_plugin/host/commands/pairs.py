"""``axolotl dpo pairs``: a model's own answers to prompts, scored and made into preference pairs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from axolotl.cli.config import gpu_capabilities
from axolotl.loaders import load_tokenizer
from tqdm import tqdm

from dpo_plugin.config import PairsConfig, parse_config
from dpo_plugin.errors import ConfigError, DataError
from dpo_plugin.host.commands.answering import Answering, tokenized
from dpo_plugin.host.commands.config_file import load_config, on_one_process, trained_folder
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.host.yaml_keys import read_yaml, typed
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.quantised_copy import identity, weight_files
from dpo_plugin.registry import get_registry
from dpo_plugin.samples.pairing import AnswersFile, Paired, ScoredAnswer, make_pairs
from dpo_plugin.samples.prompts import Prompt, read_prompts
from dpo_plugin.samples.scorers import Candidate, CheckedScorer

_RENDERING = ("type", "chat_template", "chat_template_jinja")
"""Keys of a data set's entry that decide how a prompt is rendered."""


@dataclass(frozen=True, slots=True)
class Made:
    """What `pairs` made.

    Attributes:
        out: The file of pairs.
        answers: The file of all answers with their scores.
        models: Who answered → what it is.
        counts: Prompts by what became of them, and answers that were left out.
        chosen: Mean score of the chosen answers.
        rejected: Mean score of the rejected ones.
        score: Mean score of all answers.
    """

    out: str
    answers: str
    models: Mapping[str, str]
    counts: Mapping[str, int]
    chosen: float
    rejected: float
    score: float

    def parts(self) -> list[str]:
        """Lines for the terminal."""
        who = [f"{name}: {what}" for name, what in self.models.items()]
        counted = [f"  {what}: {count}" for what, count in self.counts.items()]
        scores = f"mean score: {self.score:.4g} of all answers, {self.chosen:.4g} chosen, {self.rejected:.4g} rejected"
        return [*who, "prompts and answers", *counted, scores, f"pairs: {self.out}", f"all answers: {self.answers}"]


def pairs(
    config: str | Path,
    out: str | Path,
    prompts: str | None = None,
    answers: str | None = None,
    models: Sequence[str] = ("policy",),
    checkpoint: str | None = None,
) -> Made:
    """Let models answer prompts, score the answers, and write pairs of them.

    The policy is what has been trained into ``output_dir`` (or is in `checkpoint`), else what training starts from.
    What was done so far is in ``<out>.answers.jsonl``, with which the same command goes on.

    Args:
        config: The config of the run; what splits the model over ranks in it is left out, and so is its data.
        out: The file of pairs, rows of the type ``dpo_plugin.chat``.
        prompts: A file of prompts.
        answers: Instead of it, a file of prompts whose rows have ``answers``, a list of texts; no model is loaded.
        models: Who answers.
        checkpoint: Folder of the policy.

    Raises:
        DPOPluginError: Before a model is loaded, if something is missing; a `ScorerError` if the scorer fails; a
            `DataError` if no pair came of it.
    """
    if (prompts is None) == (answers is None):
        raise ConfigError("either --prompts or --answers names the prompts. Write: --prompts <file>")
    option, file = ("--prompts", prompts) if prompts is not None else ("--answers", answers)
    asked = read_prompts(str(file), option)
    run = _Run.read(Path(config), asked, Path(out), checkpoint)
    source = f"sha256:{hashlib.sha256(Path(str(file)).expanduser().read_bytes()).hexdigest()}"
    if answers is not None:
        who, about = {"file": str(file)}, {"file": {"weights": "unknown"}}
        kept = run.open_answers({"answers": source}, run.options.batch_size)
        _score(run, kept, _given_answers(asked, str(answers)))
    else:
        who = {name: run.folder(name) for name in models}
        about = {name: {"weights": run.weights(name)} for name in models}
        kept = run.open_answers({"prompts": source, **run.generation(), "models": about}, run.at_a_time(len(models)))
        if len(kept.answers) < len(asked):
            _generate(run, kept, models)
    plain = run.settings.datasets[0].get("type") == "dpo_plugin.text"
    made = make_pairs(asked, kept.answers, run.options, run.seed, about, plain)
    return _write(Path(out), made, kept, who)


@dataclass(frozen=True)
class _Run:
    """What a command works with, checked before a model is loaded."""

    cfg: Any
    settings: RunSettings
    policy: Path | None
    prompts: Sequence[Prompt]
    out: Path
    scorer: CheckedScorer

    @classmethod
    def read(cls, config: Path, prompts: Sequence[Prompt], out: Path, checkpoint: str | None) -> _Run:
        raw = on_one_process(read_yaml(config))
        typed(raw)
        section = raw.get("dpo_plugin") or {}
        options = parse_config(section).pairs
        first = next(iter(raw.get("datasets") or []), {"type": "dpo_plugin.chat"})
        entry = {key: first[key] for key in _RENDERING if key in first} | {"path": os.devnull}  # may not exist yet
        raw |= {"datasets": [entry], "test_datasets": None, "val_set_size": None}
        raw["dpo_plugin"] = {**section, "samples": None}
        policy = trained_folder(raw, checkpoint)
        scorers = get_registry().scorers
        scorer = CheckedScorer.make(options.scorer, scorers.find(options.scorer, "dpo_plugin.pairs.scorer"), options)
        scorer.check((prompt.question, prompt.row) for prompt in prompts)
        _check_out(out)
        cfg, settings = load_config(raw, gpu_capabilities())
        if policy is not None and cfg.adapter:
            settings = replace(
                settings, policy=AdapterFolder.open(policy, "--checkpoint" if checkpoint else "output_dir")
            )
        return cls(cfg, settings, policy, prompts, out, scorer)

    @property
    def options(self) -> PairsConfig:
        return self.settings.config.pairs

    @property
    def seed(self) -> int:
        return int(self.cfg.seed or 42)

    def at_a_time(self, models: int) -> int:
        """Prompts that are answered together, by all models."""
        return max(1, self.options.batch_size // (self.options.answers * models))

    def open_answers(self, made_of: Mapping[str, Any], at_a_time: int) -> AnswersFile:
        options = self.options
        scored = {"scorer": options.scorer, "command": options.command, "reward_model": options.reward_model}
        return AnswersFile(_answers_file(self.out), {**made_of, **scored}, at_a_time, len(self.prompts))

    def generation(self) -> dict[str, Any]:
        """What decides answers besides prompts and models."""
        own = ("answers", "temperature", "top_p", "max_new_tokens", "batch_size")
        drawn = {name: getattr(self.options, name) for name in own}
        template = {**self.settings.template, "type": self.settings.datasets[0].get("type")}
        return {**drawn, "seed": self.seed, "template": template, "numerics": dict(self.settings.numerics)}

    def folder(self, model: str) -> str:
        """Where a model's own weights are."""
        adapter = self._adapter(model)
        if adapter is not None:
            return str(adapter.path)
        return str(self.policy) if model == "policy" and self.policy else str(self.cfg.base_model)

    def weights(self, model: str) -> str:
        """What tells a model's weights from others, wherever they are: an adapter's digest, a base's files."""
        adapter = self._adapter(model)
        if adapter is not None:
            return _adapter_digest(adapter.path)
        facts = identity(weight_files(self.folder(model), self.settings.revision))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _adapter(self, model: str) -> AdapterFolder | None:
        if model == "base" or not self.cfg.adapter:
            return None
        return self.settings.policy if model == "policy" else self.settings.reference.adapter


def _answers_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.answers.jsonl")


def _check_out(out: Path) -> None:
    if out.is_dir() or (out.exists() and not _answers_file(out).exists()):
        raise ConfigError(f"`--out {out}` exists and was not made by this command. Write: --out <another file>")


def _adapter_digest(folder: Path) -> str:
    weights = next(
        folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()
    )
    with weights.open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"


def _given_answers(prompts: Sequence[Prompt], file: str) -> list[list[ScoredAnswer]]:
    found = []
    for number, prompt in enumerate(prompts, start=1):
        texts = prompt.row.get("answers")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"`--answers {file}`: prompt {number} has no answers. "
                'Write: {"prompt": "<text>", "answers": ["<text>"]}'
            )
        found.append([ScoredAnswer(text.strip(), 0.0, "file") for text in texts])
    return found


def _score(run: _Run, kept: AnswersFile, given: Sequence[Sequence[ScoredAnswer]]) -> None:
    """Score answers of a file, a few prompts at a time."""
    per = kept.at_a_time
    with tqdm(total=len(given), initial=len(kept.answers), desc="scores", unit="prompt", disable=None) as bar:
        for start in range(len(kept.answers), len(given), per):
            kept.append(_scored(run, run.prompts[start : start + per], given[start : start + per]))
            bar.update(min(per, len(given) - start))


# ── models ──


def _generate(run: _Run, kept: AnswersFile, models: Sequence[str]) -> None:
    """Answer and score what is not in the file yet, a few prompts at a time."""
    tokenizer = load_tokenizer(run.cfg)
    ids, stop_ids = tokenized(run.prompts, run.cfg, run.settings, tokenizer)
    answering = Answering.load(run.cfg, run.settings, run.policy, models)
    per = kept.at_a_time
    with tqdm(total=len(ids), initial=len(kept.answers), desc="answers", unit="prompt", disable=None) as bar:
        for start in range(len(kept.answers), len(ids), per):
            some = ids[start : start + per]
            by_model = [
                answering.answers(name, some, stop_ids, tokenizer, run.seed + len(models) * start + place)
                for place, name in enumerate(models)
            ]
            answers = [list(chain.from_iterable(of_prompt)) for of_prompt in zip(*by_model, strict=True)]
            kept.append(_scored(run, run.prompts[start : start + per], answers))
            bar.update(min(per, len(ids) - start))


def _scored(
    run: _Run, prompts: Sequence[Prompt], answers: Sequence[Sequence[ScoredAnswer]]
) -> list[list[ScoredAnswer]]:
    """Score the answers to some prompts in one batch."""
    flat = [(prompt, answer) for prompt, some in zip(prompts, answers, strict=True) for answer in some]
    scores = iter(run.scorer([Candidate(prompt.question, answer.text, prompt.row) for prompt, answer in flat]))
    return [[replace(answer, score=next(scores)) for answer in some] for some in answers]


# ── what comes of it ──


def _write(out: Path, made: Paired, kept: AnswersFile, models: Mapping[str, str]) -> Made:
    """Write the pairs under a temporary name, then under theirs.

    Raises:
        DataError: If there are none.
    """
    counts = ", ".join(f"{count} {what}" for what, count in made.counts.items())
    if not made.rows:
        raise DataError(
            f"no pair came of {len(kept.answers)} prompts ({counts}); the answers are in {kept.path}. Write: "
            "temperature: 1.0, more answers, another scorer or a smaller gap"
        )
    part = out.with_name(f"{out.name}.part")
    part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in made.rows), encoding="utf-8")
    part.replace(out)
    return Made(
        out=str(out),
        answers=str(kept.path),
        models=models,
        counts=dict(made.counts),
        chosen=mean(row["chosen_score"] for row in made.rows),
        rejected=mean(row["rejected_score"] for row in made.rows),
        score=mean(answer.score for some in kept.answers for answer in some),
    )
