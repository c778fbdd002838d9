"""``axolotl dpo audit``: what is odd about the pairs of a config, before they are trained on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.cli.config import gpu_capabilities, plugin_set_cfg
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from tqdm import tqdm

from dpo_plugin.compute.batching import row_hash, to_pair_batch
from dpo_plugin.data.files import Row
from dpo_plugin.data.keep import KeepRules, written_row
from dpo_plugin.data.near_duplicates import is_installed
from dpo_plugin.data.prepare import Preparation
from dpo_plugin.data.suspects import AuditedPair, Margins, check_pairs
from dpo_plugin.engines.ranks import packs_of
from dpo_plugin.errors import ConfigError, DataError, NotFiniteError
from dpo_plugin.host.batches import decide_layout
from dpo_plugin.host.commands.audit_text import INSTALL, audit_result
from dpo_plugin.host.commands.compare import run_trainer
from dpo_plugin.host.commands.config_file import load_config, on_one_process
from dpo_plugin.host.datasets import preparations, train_and_test
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.host.yaml_keys import read_yaml
from dpo_plugin.types import PreferencePair, RenderedPair


def audit(
    config: str | Path, reference: bool = False, rows: int = 10, keep: str | None = None, out: str | None = None
) -> dict[str, Any]:
    """Look for what is odd about the training pairs of a config; with rules, write those that they keep.

    Args:
        config: The config of the run.
        reference: Whether to show the margins of the reference, for which its model is loaded, in one process.
        rows: How many rows of a kind to name.
        keep: Rules, as `KeepRules.parse` reads them.
        out: The file for the rows that they keep.

    Returns:
        What `audit_result` gives.

    Raises:
        DPOPluginError: Before a model is loaded if an option cannot be followed; a `DataError` if no row is kept.
    """
    rules = _checked_rules(keep, out, reference)
    raw = read_yaml(config)
    cfg, settings = load_config(on_one_process(raw), gpu_capabilities()) if reference else load_config(raw)
    if reference and not settings.reference.strategy.runs_model:
        raise ConfigError(f"the reference {settings.reference.name!r} has no model. Leave out --reference")
    data = _Data.read(cfg, settings)
    if not data.held_out and rules and "new" in rules.names:
        raise ConfigError("`--keep new` is about held-out data, and the config has none. Write: val_set_size: 0.05")
    margins = Margins.of(data.pairs, data.logps(cfg, settings)) if reference else None
    checks = check_pairs(data.pairs, data.held_out, near=is_installed())
    result = audit_result(data.audits, data.pairs, len(data.held_out), checks, margins, rows)
    if rules is None or out is None:
        return {**result, "kept": None}
    kept, dropped = rules.apply(checks, margins)
    kind = data.write([data.pairs[index] for index in kept], Path(out), dropped)
    return {**result, "kept": {"rows": len(kept), "dropped": dropped, "out": out, "type": kind}}


def _checked_rules(keep: str | None, out: str | None, reference: bool) -> KeepRules | None:
    """Read the rules, and refuse what cannot be done before any data is read."""
    if keep is None and out is None:
        return None
    if keep is None or out is None:
        missing = "--keep unique,consistent" if keep is None else "--out <file>"
        raise ConfigError(f"--keep says which rows are kept and --out where they go. Write, too: {missing}")
    rules = KeepRules.parse(keep)
    if "margin" in rules.names and not reference:
        raise ConfigError("`--keep margin:…` is about margins of the reference. Write, too: --reference")
    if {"unique", "new"} & set(rules.names) and not is_installed():
        raise ConfigError(f"`--keep {keep}` drops prompts that are nearly the same, too, which takes: {INSTALL}")
    if Path(out).exists() or not Path(out).absolute().parent.is_dir():
        why = "exists" if Path(out).exists() else "is in a folder that does not exist"
        raise ConfigError(f"`--out {out}` {why}. Write: --out <another file>")
    return rules


@dataclass(frozen=True)
class _Data:
    """The pairs of a config.

    Attributes:
        prepared: What has read each data set.
        pairs: The training pairs, in the order of the files.
        hashes: `row_hash` of each.
        held_out: The held-out pairs.
        audits: The data audit of each data set.
    """

    prepared: Sequence[Preparation]
    pairs: Sequence[AuditedPair]
    hashes: Sequence[bytes]
    held_out: Sequence[AuditedPair]
    audits: Sequence[dict[str, Any]]

    @classmethod
    def read(cls, cfg: Any, settings: RunSettings) -> _Data:
        """Read every data set, preparing those that are not on disk yet."""
        _, prepared = preparations(cfg, settings)
        folder = Path(cfg.dataset_prepared_path or "last_run_prepared")
        loaded = [one.load_or_run(folder) for one in prepared]
        marked: dict[str, list[Dataset]] = {"datasets": [], "test_datasets": []}
        for number, (one, (data, _)) in enumerate(zip(prepared, loaded, strict=True)):
            marked[one.config_key.partition("[")[0]].append(data.add_column("part", [number] * len(data)))
        train, test = (_places(part) for part in train_and_test(marked, cfg))
        pairs, hashes, held_out = [], [], []
        for number, (one, (data, _)) in enumerate(zip(prepared, loaded, strict=True)):
            for row, read in zip(data, _read_again(one, data["row"]), strict=True):
                tokens = (len(row["chosen_ids"]), len(row["rejected_ids"]))
                pair = AuditedPair.of(read[1], one.config_key, row["row"], row["source"], tokens)
                if (number, row["row"]) in test:
                    held_out.append(pair)
                elif (
                    number,
                    row["row"],
                ) in train:  # axolotl leaves out what two data sets both have, if it is asked to
                    pairs.append(pair)
                    hashes.append(row_hash(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]))
        return cls(prepared, pairs, hashes, held_out, [audit for _, audit in loaded])

    def logps(self, cfg: Any, settings: RunSettings) -> list[tuple[float, float]]:
        """The reference's log-probabilities of chosen and rejected, in nats; from the run's cache, which they fill.

        Raises:
            NotFiniteError: Naming the row.
        """
        found = reference_logps(cfg, settings)
        for pair, key in zip(self.pairs, self.hashes, strict=True):
            if not all(map(math.isfinite, found[key])):
                raise NotFiniteError(f"the reference's log-probabilities of {pair.name} are {found[key]}")
        return [found[key] for key in self.hashes]

    def write(self, kept: Sequence[AuditedPair], out: Path, dropped: dict[str, int]) -> str:
        """Write the rows of pairs under a temporary name, then under theirs.

        Returns:
            The type that reads them.

        Raises:
            DataError: If there are none, or some are text and some are messages.
        """
        if not kept:
            counts = ", ".join(f"{rule} dropped {count}" for rule, count in dropped.items())
            raise DataError(f"no row is left of {len(self.pairs)} ({counts}), and {out} is not written")
        kinds = set()
        part = out.with_name(f"{out.name}.part")
        try:
            with part.open("wb") as file:
                for one in self.prepared:
                    numbers = [pair.row for pair in kept if pair.where == one.config_key]
                    for number, (row, pair) in zip(numbers, _read_again(one, numbers), strict=True):
                        file.write(written_row(row, pair, f"{one.config_key} row {number}"))
                        kinds.add("dpo_plugin.text" if isinstance(pair, RenderedPair) else "dpo_plugin.chat")
            if len(kinds) > 1:
                raise DataError(
                    "rows of `type: dpo_plugin.text` and of messages cannot stand in one file. Write: a config for each"
                )
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
        return kinds.pop()


def _places(data: Dataset | None) -> set[tuple[int, int]]:
    return set() if data is None else set(zip(data["part"], data["row"], strict=True))


def _read_again(prepared: Preparation, numbers: Sequence[int]) -> Iterator[tuple[Row, PreferencePair | RenderedPair]]:
    """Rows by number, ascending, as they are in the file and as their format reads them."""
    wanted = iter(numbers)
    next_one = next(wanted, None)
    for number, row in enumerate(prepared.source.read(), start=1):
        if next_one is None:
            return
        if number == next_one:
            assert not isinstance(row, Exception), "a row that was prepared"
            yield row, prepared.format(row, prepared.options.columns)
            next_one = next(wanted, None)


def reference_logps(cfg: Any, settings: RunSettings) -> dict[bytes, tuple[float, float]]:
    """Run the reference over the training pairs as the run does, and write what it gives into the run's cache.

    Only the loaded model tells whether cached log-probabilities are its own: their key has the reference adapter as
    attached and the base's config as loaded. So it is loaded, also where all of them are cached.

    Returns:
        `row_hash` → log-probabilities of chosen and rejected in nats, summed over completion tokens.
    """
    DPOPlugin.active().settings = settings
    plugin_set_cfg(cfg)
    found: dict[bytes, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as elsewhere:  # nothing of this belongs into output_dir
        trainer = run_trainer(DictDefault({**cfg, "output_dir": elsewhere}), settings)
        decide_layout(trainer)
        loader = trainer.get_eval_dataloader(trainer.train_dataset)
        for inputs in tqdm(loader, desc="Reference log-probs", unit="batch", disable=None):
            for pack in packs_of(trainer.accelerator, trainer._prepare_inputs(inputs), training=False):
                batch = to_pair_batch(pack)
                logps = trainer.preference_step.reference_logps(trainer.model_wrapped, batch)
                found.update(zip(batch.row_hashes, map(tuple, logps.tolist()), strict=True))
        if (cache := trainer.reference.cache) is not None:
            cache.flush()
    return found
