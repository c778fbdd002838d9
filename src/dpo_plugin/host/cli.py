"""``axolotl dpo …``."""

from __future__ import annotations

import json

import click


@click.group()
def dpo() -> None:
    """Commands of dpo_plugin."""


@dpo.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """Show every registered format, reference strategy, loss and metric, and who brought it."""
    from dpo_plugin.registry import get_registry

    registry = get_registry()
    kinds = {kind: getattr(registry, kind) for kind in registry.__dataclass_fields__}
    if as_json:
        click.echo(json.dumps({kind: {name: names.owner(name) for name in names} for kind, names in kinds.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "owner", title="dpo_plugin: what is registered")
    for kind, names in kinds.items():
        for name in names:
            table.add_row(kind.replace("_", " "), name, names.owner(name))
    Console().print(table)
