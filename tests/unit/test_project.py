"""What the project says of itself: targets, test folders, the tree in the README, the version."""

import re
import subprocess
import tomllib

import yaml

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
    assert set(job["strategy"]["matrix"]["target"]) <= set(targets())
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"


def test_contributing_names_every_folder_of_tests():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^\| `tests/(\w+)`", read("CONTRIBUTING.md"), re.M)) == folders


def test_contributing_has_the_order_of_imports_that_is_held():
    from tests.unit.test_imports import FLOORS

    said = re.search(r"from right to left here:\n(.*?)\. Only", read("CONTRIBUTING.md"), re.S)[1]
    order = [set(re.split(r",\s+", floor.strip())) for floor in said.split("←")]
    assert order == FLOORS[:-1]


def test_the_readme_names_every_room_and_no_file_that_is_not_there():
    source = ROOT / "src/dpo_plugin"
    ours = re.search(r"## What is where\n\n```\nsrc/dpo_plugin/(.*?)\nrecipes/", read("README.md"), re.S)[1]
    rooms = {path.name for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^  (\w+)/ ", ours, re.M)) == rooms
    for part in re.split(r"\n  (?=\w)", ours):
        room = re.match(r"(\w+)/ ", part)
        for name in re.findall(r"\w+\.py|[\w.]+\.jinja", part):
            assert any((source / room[1]).rglob(name)) if room else (source / name).is_file(), name


def test_the_version_has_one_source():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert dpo_plugin.__version__ == version
    assert f"## [{version}]" in read("CHANGELOG.md")
    files = subprocess.run(
        ["grep", "-rlF", f'"{version}"', "src"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert files.stdout == ""
