"""`axolotl dpo recipes`: what it lists, and copies that need no checkout."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import dpo_plugin
from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.errors import ConfigError
from dpo_plugin.host.commands import recipes
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.plan.table import OFFLOADED, SHIPPED
from tests.support.tiny import ROOT

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
FOLDERS = ("recipes", "deepspeed_configs", "fsdp_configs")


def call(*words, fails=False):
    done = CliRunner().invoke(dpo, ["recipes", *map(str, words)])
    assert done.exit_code == (1 if fails else 0), done.output
    return done.stdout if not fails else done.output


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


THERE = {f"{name}/{path}" for name in FOLDERS for path in files_in(ROOT / name)}


def texts(part):
    """Every text in a parsed YAML."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return [part] if isinstance(part, str) else [text for one in inner for text in texts(one)]


def test_the_package_has_links_to_the_folders_and_not_a_second_copy():
    assert sorted(path.name for path in recipes.SHIPPED.iterdir()) == sorted(FOLDERS)
    assert all((recipes.SHIPPED / name).resolve() == (ROOT / name).resolve() for name in FOLDERS)


def test_every_file_of_the_folders_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    package = Path(dpo_plugin.__file__).parent
    carried = {path.resolve() for pattern in patterns["dpo_plugin"] for path in package.glob(pattern)}
    assert not {(ROOT / path).resolve() for path in THERE} - carried


def test_the_list_has_every_recipe_with_what_its_head_says():
    listing = json.loads(call("--json"))
    found = {one["name"]: one for one in listing["recipes"]}
    assert sorted(found) == NAMES
    assert all(one["what"] and one["hardware"] for one in found.values())
    assert found["tiny-dpo"] == {
        "name": "tiny-dpo",
        "what": "DPO from the SFT adapter of tiny-sft.yaml, which is also the frozen reference, towards courteous and "
        "complete answers (recipes/data/preferences.jsonl).",
        "hardware": "any CPU with two cores, about a minute.",
        "files": ["recipes/data/preferences.jsonl", "recipes/data/preferences_heldout.jsonl"],
        "needs": {"base_model": "./outputs/tiny-base", "lora_model_dir": "./outputs/tiny-sft"},
    }
    assert found["nemo12b-dpo"]["needs"] == {
        "lora_model_dir": "./SFT_LoRA",
        "dpo_plugin.reference.adapter_dir": "./REF_LoRA",
    }
    assert found["qwen72b-dpo"]["files"] == [SHIPPED] == listing["engines"][:1]
    assert found["qwen72b-dpo-fsdp"]["files"] == ["fsdp_configs/fsdp2_qlora.yaml"] == listing["engines"][2:]
    assert found["qwen7b-dpo"]["files"] == []


def test_the_table_shows_names_whole_and_hardware_in_short(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = call()
    assert all(f"│ {name} " in shown for name in NAMES)
    assert "one GPU of 141 GB" in shown
    assert "planned are" not in shown
    assert "…" not in shown


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_every_file_that_the_recipe_names(name, tmp_path):
    said = call(name, "--copy", tmp_path / "new/folder")
    folder, own = tmp_path / "new/folder", f"{name}.yaml"
    text = (ROOT / "recipes" / own).read_text("utf-8")
    named = {path.removeprefix("./") for path in texts(yaml.safe_load(text))} & THERE
    in_comments = set(re.findall(r"(?:deepspeed_configs|fsdp_configs|recipes/data)/[\w./-]*\w", text))
    expected = named | in_comments
    assert files_in(folder) == {own, *expected}
    assert all((folder / path).read_bytes() == (ROOT / path).read_bytes() for path in expected)
    assert all(f"wrote {folder / path}\n" in said for path in files_in(folder))
    copied = (folder / own).read_text("utf-8")
    assert yaml.safe_load(copied) == yaml.safe_load(text)
    assert f"axolotl train {own}" in copied
    assert f"recipes/{own}" not in copied
    assert said.endswith(f"then run: cd {folder} && axolotl train {own}\n")
    assert call(name) == copied


def test_a_copy_says_what_the_user_brings_as_long_as_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "put there first: ./SFT_LoRA (lora_model_dir)\nthen run: axolotl train qwen7b-dpo.yaml\n" in call(
        "qwen7b-dpo", "--copy", "."
    )
    (tmp_path / "SFT_LoRA").mkdir()
    assert json.loads(call("qwen7b-dpo", "--copy", ".", "--json")) == {
        "written": [],
        "unchanged": ["qwen7b-dpo.yaml"],
        "needs": {},
        "command": "axolotl train qwen7b-dpo.yaml",
    }


def test_a_second_copy_changes_nothing(tmp_path):
    call("qwen72b-dpo", "--copy", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = call("qwen72b-dpo", "--copy", tmp_path)
    assert f"{tmp_path / SHIPPED} is there already, with the same contents" in said
    assert "wrote" not in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("path", ["qwen72b-dpo.yaml", SHIPPED])
def test_a_file_with_other_contents_is_kept_and_nothing_is_written(path, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("mine")
    said = call("qwen72b-dpo", "--copy", tmp_path, fails=True)
    assert f"{tmp_path / path} exists with other contents" in said
    assert "write: axolotl dpo recipes qwen72b-dpo --copy <an empty folder>" in said
    assert files_in(tmp_path) == {path}
    assert (tmp_path / path).read_text() == "mine"


@pytest.mark.parametrize("block", ["", "deepspeed_configs"])
def test_a_place_that_cannot_be_written_is_named(block, tmp_path):
    (tmp_path / "to").mkdir()
    folder = tmp_path / "to" if block else tmp_path / "to/file"
    (folder / block).write_text("a file where a folder should be")
    said = call("qwen72b-dpo", "--copy", folder, fails=True)
    assert re.search(rf"^Error: {tmp_path}/to/\S+ cannot be written: .* Write: axolotl dpo recipes qwen72b-dpo", said)


def test_a_dangling_link_is_not_written_through(tmp_path):
    (tmp_path / "qwen7b-dpo.yaml").symlink_to(tmp_path / "elsewhere")
    assert "cannot be written: File exists" in call("qwen7b-dpo", "--copy", tmp_path, fails=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["qwen72-dpo"], "there is no recipe 'qwen72-dpo'. Known: gemma3-12b-dpo, "),
        (["qwen72-dpo"], "Write: axolotl dpo recipes qwen72b-dpo\n"),
        (["recipes/qwen7b-dpo.yaml", "--copy", "a b"], "Write: axolotl dpo recipes qwen7b-dpo --copy 'a b'\n"),
        (["zero3_bf16.json"], f"Write: axolotl dpo recipes {SHIPPED}\n"),
        (["../pyproject.toml", "--copy", "."], "there is no recipe '../pyproject.toml'"),
        (["--copy", "here"], f"Known: {', '.join(NAMES)}. Write: axolotl dpo recipes gemma3-12b-dpo --copy here\n"),
    ],
)
def test_a_name_that_is_not_shipped(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in call(*words, fails=True)
    assert not files_in(tmp_path)


def test_an_installation_without_recipes_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "SHIPPED", tmp_path)
    assert "Run: pip install --force-reinstall --no-deps dpo-plugin" in call(fails=True)


@pytest.mark.parametrize("path", [SHIPPED, OFFLOADED])
def test_the_config_of_an_engine_is_copied_alone(path, tmp_path):
    assert call(path, "--copy", tmp_path) == f"wrote {tmp_path / path}\n"
    assert files_in(tmp_path) == {path}
    assert json.loads((tmp_path / path).read_text()) == json.loads(call(path))


def test_what_an_error_proposes_works_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        EngineSettings.read({"deepspeed": "zero9.json"})
    words, line = re.search(r"`axolotl dpo recipes (.+)` .*Write: (.+)$", str(caught.value)).groups()
    call(*words.split())
    assert EngineSettings.read(yaml.safe_load(line)).name == "zero3"


def test_the_error_of_fsdp1_names_a_command_that_shows_what_to_write():
    with pytest.raises(ConfigError) as caught:
        EngineSettings.read({"fsdp_config": {"reshard_after_forward": True}, "fsdp_version": 1})
    shown = yaml.safe_load(call(*re.search(r"`axolotl dpo recipes (.+?)`", str(caught.value))[1].split()))
    assert EngineSettings.read(shown).name == "fsdp2"
