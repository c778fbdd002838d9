"""Preference data through axolotl's config: token ids before any model is loaded, and an audit of every row."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.loaders import load_tokenizer
from axolotl.utils.data import shared
from axolotl.utils.data.shared import create_train_validation_split, load_dataset_with_config, merge_datasets
from axolotl.utils.dict import DictDefault
from datasets import Dataset, DatasetDict

from dpo_plugin.config import DataConfig
from dpo_plugin.data.audit import audit_lines
from dpo_plugin.data.formats import ROLES, Columns, PreferenceFormat, conversations, messages_answers
from dpo_plugin.data.prepare import LengthLimit, Preparation, PrepareOptions
from dpo_plugin.data.sources import RowSource, as_written, dataset_rows, local_source
from dpo_plugin.errors import ConfigError, DataError
from dpo_plugin.host.base_model import check_base
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import PREFIX, RunSettings
from dpo_plugin.host.templates import renderer_of
from dpo_plugin.registry import get_registry
from dpo_plugin.report.run_folder import AUDIT
from dpo_plugin.report.shown import shown_text
from dpo_plugin.types import PreferencePair


def _last_messages(row: Mapping[str, Any], columns: Columns) -> PreferencePair:
    """``chat_template.default`` of axolotl: of an answer that is a message list, the last message counts."""
    last = {
        column: row[column][-1]
        for column in (columns.chosen, columns.rejected)
        if isinstance(row.get(column), list) and row[column]
    }
    return messages_answers({**row, **last}, columns)


# Host types that are read by ours, which mean the same: the audit accounts for their rows, and short answers come out
# whole, which axolotl 0.19 and 0.20 cut at the wrong place (prompt_strategies/dpo/chat_template.py:109,230), 0.21 only
# where the template does not render a prompt as it begins the whole conversation (:27).
HOST_TYPES: Mapping[str, PreferenceFormat] = {
    "chat_template": _last_messages,
    "chat_template.default": _last_messages,
    "chat_template.argilla_chat": conversations,
}


def load_datasets(cfg: Any, settings: RunSettings) -> TrainDatasetMeta | None:
    """Training and evaluation pairs as token ids, their audits printed and saved; None leaves it to the host.

    The host prepares the data where a data set is of one of its other types (``chatml.intel``, ``user_defined``, …) or
    ``skip_prepare_dataset`` is set, which formats of ours cannot be mixed with.
    """
    check_base(cfg, settings)
    ours, theirs = _types(settings)
    if cfg.skip_prepare_dataset and ours:
        raise ConfigError(
            f"`skip_prepare_dataset: true` leaves the data to axolotl, which cannot read `type: {ours[0]}`. "
            "Write: skip_prepare_dataset: false"
        )
    if not ours and (cfg.skip_prepare_dataset or theirs):
        return None
    _, parts, audits = prepare_all(cfg, settings)
    report_audits(audits, Path(cfg.output_dir))
    train, test = train_and_test(parts, cfg)
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return TrainDatasetMeta(train_dataset=train, eval_dataset=test, total_num_steps=steps)


def _types(settings: RunSettings) -> tuple[list[str], list[str]]:
    """The types of dataset entries that are ours, and those that only the host can read."""
    kinds = [str(entry.get("type")) for entry in (*settings.datasets, *settings.test_datasets)]
    ours = [kind for kind in kinds if kind.startswith(PREFIX)]
    return ours, [kind for kind in kinds if kind not in (*ours, *HOST_TYPES)]


def train_and_test(parts: Mapping[str, list[Dataset]], cfg: Any) -> tuple[Dataset, Dataset | None]:
    """Training and held-out pairs of the parts that `prepare_all` gives, mixed and split as the config says."""
    train = merge_datasets(parts["datasets"], cfg)
    if parts["test_datasets"]:
        return train, merge_datasets(parts["test_datasets"], cfg)
    return create_train_validation_split(train, cfg, cfg.val_set_size) if cfg.val_set_size else (train, None)


def prepare_all(cfg: Any, settings: RunSettings) -> tuple[Any, dict[str, list[Dataset]], list[dict[str, Any]]]:
    """Load every data set of a config, preparing those that are not on disk yet.

    Returns:
        The tokenizer; ``datasets`` and ``test_datasets`` → their parts; and one audit per part.

    Raises:
        ConfigError: If a data set is of a type that only the host can read.
    """
    tokenizer, prepared = preparations(cfg, settings)
    folder = Path(cfg.dataset_prepared_path or "last_run_prepared")
    parts: dict[str, list[Dataset]] = {"datasets": [], "test_datasets": []}
    audits = []
    for one in prepared:
        data, audit = one.load_or_run(folder)
        parts[one.config_key.partition("[")[0]].append(data)
        audits.append(audit)
    return tokenizer, parts, audits


def preparations(cfg: Any, settings: RunSettings) -> tuple[Any, list[Preparation]]:
    """The tokenizer, and what prepares each data set of a config, in its order.

    Raises:
        ConfigError: If a data set is of a type that only the host can read.
    """
    if theirs := _types(settings)[1]:
        raise ConfigError(f"`type: {theirs[0]}` is read by axolotl alone. Write: type: dpo_plugin.chat")
    tokenizer = load_tokenizer(cfg)
    return tokenizer, [
        preparation(cfg, settings, entry, f"{key}[{index}]", tokenizer)
        for key, entries in (("datasets", settings.datasets), ("test_datasets", settings.test_datasets))
        for index, entry in enumerate(entries)
    ]


def preparation(cfg: Any, settings: RunSettings, entry: Mapping[str, Any], where: str, tokenizer: Any) -> Preparation:
    """Prepare one dataset entry; its own keys override those of the section."""
    data = settings.config.data
    kind = str(entry["type"])
    read = HOST_TYPES[kind] if kind in HOST_TYPES else get_registry().formats[kind.removeprefix(PREFIX)]
    renderer = renderer_of(cfg, entry, tokenizer, data.special_tokens == "refuse")
    strategy: Any = (cfg.excess_length_strategy or "drop").lower()
    options = PrepareOptions(
        limit=LengthLimit(cfg.sequence_len, strategy, data.truncation_side),
        columns=_columns(data, entry),
        sample_fraction=data.sample_fraction,
        seed=cfg.seed or 42,
        drop_duplicates=bool(cfg.dataset_exact_deduplication),
        max_bad_rows=data.max_bad_rows,
    )
    return Preparation(where, _source(cfg, entry, where), read, renderer, options)


def _columns(data: DataConfig, entry: Mapping[str, Any]) -> Columns:
    """Resolve column names: the host's keys of the dataset entry, then ``dpo_plugin.data``, then the usual ones."""
    properties = entry.get("message_property_mappings") or {}
    own = {name: entry.get(f"field_{name}") for name in ("chosen", "rejected", "messages")}
    own |= {name: properties.get(name) for name in ("role", "content")}
    named = data.columns.model_dump() | {name: column for name, column in own.items() if column}
    roles = {name: role for role, names in (entry.get("roles") or {}).items() for name in names}
    return Columns(**named, roles={**ROLES, **data.roles, **roles})


def _source(cfg: Any, entry: Mapping[str, Any], where: str) -> RowSource:
    """Open a local entry with our reader; a hub, cloud or URL entry with the host's."""
    if (source := local_source(entry)) is not None:
        return source

    def load(**more: Any) -> Any:
        """The host's loader, with further arguments for `datasets.load_dataset`."""
        with patch.object(shared, "load_dataset", partial(shared.load_dataset, **more)):
            return load_dataset_with_config(DictDefault(entry), cfg.hf_use_auth_token, streaming=False)

    try:
        rows = as_written(load(), load)
    except Exception as error:  # the hub, the clouds and datasets raise errors of their own kinds
        raise DataError(f"`{where}.path: {entry['path']}` cannot be loaded: {error}") from error
    if isinstance(rows, DatasetDict):
        split = entry.get("split") or ("train" if where.startswith("datasets") else "test")
        if split not in rows:
            raise DataError(f"`{where}` ({entry['path']}) has no split {split!r}. Write: split: {next(iter(rows))}")
        rows = rows[split]
    return RowSource(str(entry["path"]), rows._fingerprint, lambda: dataset_rows(rows))


def report_audits(audits: Sequence[Mapping[str, Any]], output_dir: Path) -> None:
    """Print the audits and write ``data_audit.json``, on one process."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    shown = [{**audit, "path": shown_text(str(audit["path"]))} for audit in audits]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / AUDIT).write_text(json.dumps({"datasets": shown}, indent=2), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"the data audit cannot be written to `output_dir: {output_dir}`: {error.strerror}. Write: output_dir: <a "
            "folder that you can write to>"
        ) from error
    LOG.info("dpo_plugin: data audit\n" + "\n".join(audit_lines(audits)))
