"""``axolotl dpo …``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from dpo_plugin.errors import DPOPluginError


@click.group()
def dpo() -> None:
    """Preference tuning: look at data, references and results."""


def explained(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print what a command returns, alone on stdout; show our errors as one message instead of a traceback.

    The host and its libraries log to stdout; what they say while the command works goes to stderr.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = command(*args, **kwargs)
            show(result)
        except DPOPluginError as error:
            raise click.ClickException(str(error)) from error

    return run


def show(result: Any) -> None:
    """JSON for a dict, as one line; rich tables and texts for a list."""
    if isinstance(result, dict):
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for part in result:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


@dpo.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def plugins(as_json: bool) -> Any:
    """Show every registered format, reference strategy, loss and metric, and who brought it."""
    from dpo_plugin.registry import get_registry

    registry = get_registry()
    kinds = {kind: getattr(registry, kind) for kind in registry.__dataclass_fields__}
    if as_json:
        return {kind: {name: names.owner(name) for name in names} for kind, names in kinds.items()}
    from rich.table import Table

    table = Table("kind", "name", "owner", title="dpo_plugin: what is registered")
    for kind, names in kinds.items():
        for name in names:
            table.add_row(kind.replace("_", " "), name, names.owner(name))
    return [table]


@dpo.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--rows", default=3, show_default=True, help="How many pairs to show.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def preview(config: str, rows: int, split: str, as_json: bool) -> Any:
    """Show pairs of CONFIG as the model will see them, then the data audit; loads the tokenizer only."""
    from dpo_plugin.data.audit import audit_lines
    from dpo_plugin.host.configs import read_config
    from dpo_plugin.host.datasets import prepare_all
    from dpo_plugin.host.preview import pair_record, pair_text

    cfg, settings = read_config(config)
    tokenizer, parts, audits = prepare_all(cfg, settings)
    shown = [row for part in parts["datasets" if split == "train" else "test_datasets"] for row in part.take(rows)][
        :rows
    ]
    if as_json:
        return {"pairs": [pair_record(row, tokenizer) for row in shown], "audit": audits}
    side = settings.config.data.truncation_side
    pairs = [line for row in shown for line in pair_text(row, tokenizer, side)]
    return [*pairs, "── data audit", *audit_lines(audits)]
