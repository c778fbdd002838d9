"""What the project says of itself: targets, test folders, the tree in the README, the version."""

import platform
import re
import subprocess
import tomllib
from importlib.metadata import requires, version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dpo_plugin
from tests.support.tiny import ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def targets():
    return re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)[1].split()


def test_help_lists_every_target():
    said = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert sorted(line.split()[1] for line in said.stdout.splitlines()) == sorted(targets())


def test_ci_runs_targets_that_exist():
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert {*matrix["target"], *(one["target"] for one in matrix["include"])} <= set(targets())
    assert {*matrix["python"], *(one["python"] for one in matrix["include"])} == {row["Python"] for row in hosts()}
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }} PYTHON=python"


def test_contributing_names_every_folder_of_tests():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^\| `tests/(\w+)`", read("CONTRIBUTING.md"), re.M)) == folders


def test_contributing_has_the_order_of_imports_that_is_held():
    from tests.unit.test_imports import FLOORS

    said = re.search(r"from right to left here:\n(.*?)\. Only", read("CONTRIBUTING.md"), re.S)[1]
    order = [set(re.split(r",\s+", floor.strip())) for floor in said.split("←")]
    assert order == FLOORS[:-1]


def test_contributing_names_every_room_and_no_file_that_is_not_there():
    source = ROOT / "src/dpo_plugin"
    ours = re.search(r"## What is where\n\n```\nsrc/dpo_plugin/(.*?)\nrecipes/", read("CONTRIBUTING.md"), re.S)[1]
    rooms = {path.name for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^  (\w+)/ ", ours, re.M)) == rooms
    for part in re.split(r"\n  (?=\w)", ours):
        room = re.match(r"(\w+)/ ", part)
        for name in re.findall(r"\w+\.py|[\w.]+\.jinja", part):
            assert any((source / room[1]).rglob(name)) if room else (source / name).is_file(), name


def hosts():
    """The table of tested hosts in the README: a dictionary a row, by the column's name."""
    head, _, *rows = re.search(r"^\| Python \|.*\n(?:\|.*\n)+", read("README.md"), re.M)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def test_the_hosts_that_the_readme_lists_are_those_that_are_admitted():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]["deepspeed"]
    admitted = {pin.name: pin.specifier for pin in map(Requirement, [*project["dependencies"], *extras])}
    for row in hosts():
        for name in {"axolotl", "trl", "peft", "transformers", "torch", "deepspeed"}:
            assert row[name] in admitted[name], (name, row)
    listed = {Version(row["axolotl"]).minor for row in hosts()}
    assert listed == {minor for minor in range(100) if f"0.{minor}.0" in admitted["axolotl"]}
    known = {re.search(r"Python :: (3\.\d+)", line) for line in project["classifiers"]} - {None}
    assert {row["Python"] for row in hosts()} == {match[1] for match in known}


def test_the_readme_lists_this_host_with_what_it_pins():
    python, axolotl = platform.python_version_tuple()[:2], version("axolotl")
    rows = [row for row in hosts() if (row["Python"], row["axolotl"]) == (".".join(python), axolotl)]
    if not rows:
        pytest.skip(f"axolotl {axolotl} on Python {'.'.join(python)} is not one of those in the README")
    pins = {pin.name: pin.specifier for pin in map(Requirement, requires("axolotl")) if not pin.extras}
    for name in ("trl", "peft", "transformers", "torch", "bitsandbytes"):
        assert rows[0][name] in pins[name], name


def test_the_version_has_one_source():
    ours = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert dpo_plugin.__version__ == ours
    assert re.search(rf"^## \[{ours}\] - \d{{4}}-\d\d-\d\d$", read("CHANGELOG.md"), re.M)
    files = subprocess.run(["grep", "-rlF", f'"{ours}"', "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert files.stdout == ""


def test_the_readme_is_a_start_and_no_reference():
    assert len(read("README.md").splitlines()) <= 120
