"""``axolotl dpo …``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from itertools import chain, islice
from typing import Any

import click

from dpo_plugin.errors import DPOPluginError


@click.group()
def dpo() -> None:
    """Preference tuning: look at data, references and results."""


def command(function: Callable[..., Any]) -> click.Command:
    """Make a command that prints what the function returns, alone on stdout, and our errors as one message.

    The host and its libraries log to stdout; what they say while the command works goes to stderr.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = function(*args, **kwargs)
            show(result)
        except DPOPluginError as error:
            raise click.ClickException(str(error)) from error

    made = dpo.command()(run)
    made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."))
    return made


def show(result: Any) -> None:
    """JSON for a dict, as one line; rich tables and texts for a list."""
    if isinstance(result, dict):
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for part in result:
        console.print(part, markup=False, emoji=False) if isinstance(part, str) else console.print(part)


@command
def plugins(as_json: bool) -> Any:
    """Show everything that is registered (formats, losses, scorers, …), and who brought it."""
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


@command
@click.argument("name", required=False)
@click.option("--copy", "folder", metavar="DIR", help="Write it there, with the files that it names.")
def recipes(name: str | None, folder: str | None, as_json: bool) -> Any:
    """List the recipes that come with the plugin; show the one called NAME, or copy it and the files that it names."""
    from dpo_plugin.host.commands.recipes import recipes as run

    found = run(name, folder)
    return asdict(found) if as_json else found.parts()


@command
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--rows", type=click.IntRange(min=0), default=3, show_default=True, help="How many pairs to show.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
def preview(config: str, rows: int, split: str, as_json: bool) -> Any:
    """Show pairs of CONFIG as the model will see them, then the data audit; loads the tokenizer only."""
    from dpo_plugin.data.audit import audit_lines
    from dpo_plugin.host.commands.config_file import load_config
    from dpo_plugin.host.commands.preview import pair_record, pair_text
    from dpo_plugin.host.datasets import prepare_all
    from dpo_plugin.host.yaml_keys import read_yaml

    cfg, settings = load_config(read_yaml(config))
    tokenizer, parts, audits = prepare_all(cfg, settings)
    chosen = parts["datasets" if split == "train" else "test_datasets"]
    shown = list(islice(chain.from_iterable(chosen), rows))
    if as_json:
        return {"pairs": [pair_record(row, tokenizer) for row in shown], "audit": audits}
    side = settings.config.data.truncation_side
    pairs = [line for row in shown for line in pair_text(row, tokenizer, side)]
    return [*pairs, "── data audit", *audit_lines(audits)]


@command
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--reference", is_flag=True, help="Load the reference and show its margins; they are cached for the run.")
@click.option(
    "--rows", type=click.IntRange(min=1), default=10, show_default=True, help="How many rows of a kind to name."
)
@click.option(
    "--keep", metavar="RULE[,RULE...]", help="Rules for the rows in --out: unique, consistent, new, margin:LOW..HIGH."
)
@click.option("--out", metavar="FILE", help="With --keep, the file for the rows that pass, as JSON lines.")
def audit(config: str, as_json: bool, **options: Any) -> Any:
    """Look for what is odd about the training pairs of CONFIG: repeats, contradictions, leaks, margins."""
    from dpo_plugin.host.commands.audit import audit as run
    from dpo_plugin.host.commands.audit_text import audit_parts

    found = run(config, **options)
    return found if as_json else audit_parts(found)


@command
@click.argument("runs", nargs=-1, required=True, metavar="OUTPUT_DIR...")
@click.option("--out", type=click.Path(dir_okay=False), help="HTML file. Default: report.html in the first folder.")
def report(runs: tuple[str, ...], out: str | None, as_json: bool) -> Any:
    """Write one page about a run, or about several side by side; loads no model."""
    from pathlib import Path

    from dpo_plugin.registry import get_registry
    from dpo_plugin.report.report import verdict, write_report
    from dpo_plugin.report.run_folder import read_run

    checks = get_registry().health_checks
    records = [read_run(run, checks, checks.owner) for run in runs]
    page = write_report(records, out or Path(runs[0]) / "report.html")
    if as_json:
        found = [
            {"run": run.name, "verdict": verdict(run)[0], "findings": [asdict(one) for one in run.findings]}
            for run in records
        ]
        return {"report": str(page), "runs": found}
    said = [f"{run.name}: {verdict(run)[1]}" for run in records]
    return [*said, *(note for run in records for note in run.notes), f"report: {page}"]


@command
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--prompts", metavar="FILE", help="Prompts: JSON lines or text. Default: of `samples`, or held-out pairs."
)
@click.option("--checkpoint", metavar="DIR", help="The policy. Default: output_dir.")
@click.option("--scorer", metavar="NAME", help="Judges the answers. Default: that of `samples`, if any.")
@click.option(
    "--temperature", "temperatures", type=click.FloatRange(min=0), multiple=True, metavar="T",
    help="Judge answers at this temperature, too; may be repeated.",
)  # fmt: skip
def compare(config: str, as_json: bool, **options: Any) -> Any:
    """Show answers of policy and reference side by side, and accuracy and margin on held-out pairs, by source."""
    from dpo_plugin.host.commands.compare import compare as run

    found = run(config, **options)
    return asdict(found) if as_json else found.parts()


@command
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", required=True, metavar="FILE", help="The file of pairs, as JSON lines.")
@click.option("--prompts", metavar="FILE", help="Prompts: JSON lines or text.")
@click.option("--answers", metavar="FILE", help="Instead of prompts: JSON lines that have `answers`, too.")
@click.option(
    "--model", "models", type=click.Choice(["policy", "reference", "base"]), multiple=True, default=["policy"],
    show_default=True, help="Who answers; may be repeated.",
)  # fmt: skip
@click.option("--checkpoint", metavar="DIR", help="The policy. Default: output_dir once trained, else where it starts.")
def pairs(config: str, as_json: bool, **options: Any) -> Any:
    """Make pairs of a model's own answers to prompts, scored by the scorer of `dpo_plugin.pairs`."""
    from dpo_plugin.host.commands.pairs import pairs as run

    made = run(config, **options)
    return asdict(made) if as_json else made.parts()


@command
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--gpus", type=int, required=True, help="GPUs of the node, one process each.")
@click.option("--gpu-memory", type=float, required=True, help="Memory of each in GiB.")
@click.option("--host-memory", type=float, help="Memory of the node in GiB.  [default: this machine's]")
def plan(config: str, gpus: int, gpu_memory: float, host_memory: float | None, as_json: bool) -> Any:
    """Say what CONFIG needs per GPU with each engine, and what to write; reads no weights and needs no GPU."""
    from dpo_plugin.host.yaml_keys import read_yaml, typed
    from dpo_plugin.plan.planner import make_plan
    from dpo_plugin.plan.table import plan_report

    made = make_plan(typed(read_yaml(config)), config, gpus, gpu_memory, host_memory)
    return made if as_json else plan_report(made)
