"""Scorers outside of this process's code: a program of the user's, and a reward model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dpo_plugin.config import PairsConfig
from dpo_plugin.errors import ConfigError, ScorerError
from dpo_plugin.plain_text import one_line
from dpo_plugin.samples.scorers import BatchScorer, Candidate


class CommandScorer(BatchScorer):
    """A program that reads a JSON object per line (``prompt``, ``answer``, the row's keys) and prints numbers.

    It is started once per batch, without a shell. What it writes to stderr is seen.

    Raises:
        ConfigError: If ``pairs.command`` is missing or names no program.
    """

    def __init__(self, options: PairsConfig):
        super().__init__(options)
        if options.command is None:
            raise ConfigError("`pairs.scorer: command` needs a program. Write: command: python score.py")
        try:
            self.words = shlex.split(options.command)
        except ValueError as error:
            raise ConfigError(
                f"`pairs.command: {options.command}` cannot be split into words: {error}. "
                "Write: command: python score.py"
            ) from error
        if not self.words or shutil.which(self.words[0]) is None:
            raise ConfigError(f"`pairs.command: {options.command}` names no program. Write: command: python score.py")

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Run the program on a batch.

        Raises:
            ScorerError: If it ends with an error, prints something else than numbers, or takes too long.
        """
        rows = [{**one.row, "prompt": one.prompt, "answer": one.answer} for one in candidates]
        printed = self._run("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)).split("\n")
        lines = [line for line in printed if line.strip()]
        scores = []
        for line in lines:
            try:
                scores.append(float(line))
            except ValueError as error:
                raise self._error(f"printed {one_line(line, 60)!r}, which is no number") from error
        return scores

    def _run(self, text: str) -> str:
        limit = self.options.timeout
        with subprocess.Popen(
            self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed, _ = process.communicate(text, timeout=limit)
            except subprocess.TimeoutExpired as error:
                raise self._error(f"took longer than {limit:g} s for a batch. Write: timeout: {2 * limit:g}") from error
            except UnicodeDecodeError as error:
                raise self._error("printed something else than UTF-8 text") from error
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started, which may hold the pipe
        if process.returncode:
            raise self._error(f"ended with {process.returncode}")
        return printed

    def _error(self, what: str) -> ScorerError:
        end = "" if "Write:" in what else ". Mend it, or write: command: <another program>"
        return ScorerError(f"the scorer `pairs.command: {self.options.command}` {what}{end}")


class RewardModelScorer(BatchScorer):
    """The one output of a sequence-classification model on the conversation, in its tokenizer's chat template.

    Raises:
        ConfigError: If ``pairs.reward_model`` is missing, cannot be read, or has another number of outputs.
    """

    def __init__(self, options: PairsConfig):
        super().__init__(options)
        name = options.reward_model
        if name is None:
            raise ConfigError("`pairs.scorer: reward_model` needs a model. Write: reward_model: <folder or repository>")
        try:
            labels = AutoConfig.from_pretrained(name).num_labels
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"`pairs.reward_model: {name}` cannot be read: {one_line(str(error), 200)}. "
                "Write: reward_model: <a folder>"
            ) from error
        if labels != 1 or not self.tokenizer.chat_template:
            what = f"has {labels} outputs" if labels != 1 else "has no chat template"
            raise ConfigError(
                f"`pairs.reward_model: {name}` {what}; a reward model has one output and reads conversations. Write: "
                "reward_model: <another model>"
            )
        self.model: torch.nn.Module | None = None

    @torch.no_grad()
    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Score one conversation at a time, so that none is padded."""
        if self.model is None:
            self.model = AutoModelForSequenceClassification.from_pretrained(self.options.reward_model, dtype="auto")
            self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        device = next(self.model.parameters()).device
        scores = []
        for one in candidates:
            asked = one.row.get("messages") or [{"role": "user", "content": one.prompt}]
            ids = self.tokenizer.apply_chat_template(
                [*asked, {"role": "assistant", "content": one.answer}], return_tensors="pt", return_dict=True
            )
            scores.append(float(self.model(**ids.to(device)).logits.float().squeeze()))
        return scores
