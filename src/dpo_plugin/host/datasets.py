"""Preference data through axolotl's config: our formats become token ids before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from datasets import Dataset, DatasetDict, concatenate_datasets

from dpo_plugin.data.formats import Columns
from dpo_plugin.data.render import Renderer
from dpo_plugin.errors import DataError, RowError
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import PREFIX, RunSettings
from dpo_plugin.registry import get_registry


def load_datasets(cfg: Any, settings: RunSettings) -> TrainDatasetMeta | None:
    """Training and evaluation pairs as token ids; None if a data set is of a host type."""
    entries = [*settings.datasets, *settings.test_datasets]
    if not all(str(entry.get("type")).startswith(PREFIX) for entry in entries):
        return None
    renderer = Renderer(load_tokenizer(cfg))
    train = _load_split(cfg, settings.datasets, "datasets", renderer)
    test = _load_split(cfg, settings.test_datasets, "test_datasets", renderer) if settings.test_datasets else None
    if cfg.shuffle_merged_datasets is not False and not cfg.curriculum_sampling:
        train = train.shuffle(seed=cfg.seed or 42)
    if test is None and cfg.val_set_size:
        parts = train.train_test_split(test_size=cfg.val_set_size, seed=cfg.seed or 42)
        train, test = parts["train"], parts["test"]
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return TrainDatasetMeta(train_dataset=train, eval_dataset=test, total_num_steps=steps)


def _load_split(cfg: Any, entries: list[dict[str, Any]], key: str, renderer: Renderer) -> Dataset:
    return concatenate_datasets(
        [_prepare(cfg, entry, f"{key}[{index}]", renderer) for index, entry in enumerate(entries)]
    )


def _prepare(cfg: Any, entry: dict[str, Any], where: str, renderer: Renderer) -> Dataset:
    rows = load_dataset_with_config(DictDefault(entry), cfg.hf_use_auth_token, streaming=False)
    if isinstance(rows, DatasetDict):
        rows = rows[entry.get("split") or "train"]
    read = get_registry().formats[entry["type"].removeprefix(PREFIX)]
    rendered, sources, bad = [], [], []
    for number, row in enumerate(rows, start=1):
        try:
            pair = read(row, Columns())
            rendered.append(renderer.render(pair))
            sources.append(pair.source)
        except RowError as error:
            bad.append(f"row {number}: {error}")
    if not rendered:
        raise DataError(f"`{where}` ({entry['path']}) has no usable row. {bad[0] if bad else 'It is empty.'}")
    if bad:
        LOG.warning(f"dpo_plugin: {where}: {len(bad)} of {len(rows)} rows left out; {'; '.join(bad[:3])}")
    ids = renderer.tokenize(rendered)
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in ids],
            "chosen_ids": [pair.chosen for pair in ids],
            "rejected_ids": [pair.rejected for pair in ids],
            "source": sources,
        }
    )


def host_strategy(name: str) -> Callable[..., Any]:
    """A host prompt strategy for ``type: dpo_plugin.<name>``, for data sets that the host prepares as text."""

    def strategy(cfg: Any, dataset_idx: int = 0, **_: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        read = get_registry().formats[name]

        def transform(sample: Mapping[str, Any], tokenizer: Any = None) -> dict[str, str]:
            pair = Renderer(tokenizer).render(read(sample, Columns()))
            return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}

        return transform, {"remove_columns": "__all__"}

    return strategy
