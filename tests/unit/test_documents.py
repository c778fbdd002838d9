"""The documents, checked against the code: links, paths, commands and their options, Python blocks, generated pages."""

import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml

from dpo_plugin.__main__ import dpo
from dpo_plugin.config import parse_config
from dpo_plugin.host.yaml_keys import LINES_OF_OTHERS
from dpo_plugin.metrics.fields import FIELDS
from dpo_plugin.registry import build_manager, build_registry
from tests import settings_page
from tests.support.tiny import ROOT
from tests.unit.test_project import targets

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + [page for folder in ("docs", "benchmarks", "examples/*") for page in ROOT.glob(f"{folder}/*.md")]
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pages
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_every_path_of_the_repository_that_is_named_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for path in re.findall(
        r"`((?:src|tests|recipes|examples|docs|benchmarks|deepspeed_configs|fsdp_configs)/[\w./-]+)`", text
    ):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


def lines(page: Path) -> list[str]:
    """Console lines, those of a block and those in the text, continued lines as one."""
    text = page.read_text(encoding="utf-8")
    shown = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:axolotl|make|python -m) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [line for line in [*shown, *inline] if line.strip() and not line.startswith("#")]


def host_commands() -> dict[str, click.Command]:
    from axolotl.cli.main import cli

    return cli.commands


@pages
def test_every_console_line_names_commands_and_options_that_there_are(page):
    for line in lines(page):
        words = shlex.split(line, comments=True)
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # of the environment
        if words[:2] == ["axolotl", "dpo"] or words[:3] == ["python", "-m", "dpo_plugin"]:
            rest = words[2:] if words[0] == "axolotl" else words[3:]
            if not rest or not re.fullmatch(r"[a-z]+", rest[0]):
                continue
            known = {option for one in dpo.commands[rest[0]].params for option in one.opts}
            assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, line
        elif words[0] == "axolotl" and re.fullmatch(r"[a-z-]+", words[1]):
            assert words[1] in host_commands(), line
        elif words[0] == "make":
            assert words[1] in targets(), line
        elif words[:2] == ["python", "-m"] and words[2].startswith("tests"):
            name = ROOT / words[2].replace(".", "/").replace("<name>", "rows")
            assert name.with_suffix(".py").is_file() or name.is_dir(), line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1] in ("-m", "-c"), line


@pages
def test_every_python_block_runs_and_its_hooks_can_be_registered(page):
    for block in blocks(page, "python"):
        module = ModuleType("of_the_page")
        exec(compile(block, page.name, "exec"), vars(module))
        manager = build_manager()
        manager.register(module)
        build_registry(manager)


@pages
def test_every_section_of_ours_in_the_text_is_one(page):
    text = page.read_text(encoding="utf-8")
    for inline in re.findall(r"`(dpo_plugin: \{[^`]*\})`", text):
        if "…" not in inline and "<" not in inline:
            parse_config(yaml.safe_load(inline)["dpo_plugin"])


def test_the_page_of_settings_is_made_of_the_schema():
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


def test_the_pages_have_something_to_check():
    found = [line for page in PAGES for line in lines(page)]
    assert len(found) >= 40
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 4


def fields_of_the_log() -> list[str]:
    """First column of the table in log.md, as patterns: `_p50` belongs to the name before it."""
    text = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    cells = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| (`[^|]*) \|", text, re.M)]
    patterns = []
    for cell in cells:
        for name in cell:
            whole = re.sub(r"_p\d+$", name, cell[0]) if name.startswith("_") else name.replace("…/", "rewards/")
            patterns.append(re.sub(r"…|<\w+>", ".+", whole))
    return patterns


def test_every_field_of_the_log_is_in_its_table_and_no_other():
    logged = {"rewards/accuracies/web", "rewards/margins/web", "rewards/count/web", *FIELDS}
    patterns = fields_of_the_log()
    assert not [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in logged)]


def test_the_names_of_trl_are_those_that_are_refused_with_a_line():
    rows = re.findall(r"^\| `(\w+)` \| `(.*)` \|$", (ROOT / "docs/from-trl.md").read_text(encoding="utf-8"), re.M)
    refused = {name: line.format("…") for name, line in LINES_OF_OTHERS.items()}
    assert {name: line for name, line in rows if name in refused} == refused


def test_every_message_under_troubleshooting_is_one_of_ours():
    said = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'["\']\s*\n\s*f?["\']', "", code)  # messages over several lines
    assert len(said) >= 20
    assert not [text for text in said for part in text.split("…") if part.strip() and part not in joined]
