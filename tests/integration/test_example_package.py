"""`examples/dpo-plugin-example`: its wheel beside ours, in an environment that knows neither checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.tiny import ROOT

EXAMPLE = ROOT / "examples/dpo-plugin-example"
OFFLINE = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]


def run(*line, cwd, **env):
    """Stdout of a command that must succeed, without the checkout on its path."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, line)], cwd=cwd, env=kept | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment with the two wheels, and this one's other packages behind them."""
    folder = tmp_path_factory.mktemp("fresh")
    tiny.copy_tree(folder / "ours")
    shutil.copytree(EXAMPLE, folder / "theirs", ignore=tiny.LEFT_BY_BUILDS)
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "--no-build-isolation", "./ours", "./theirs", "-w", "dist", *OFFLINE, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
    found = folder / "env/bin/python"
    site = run(found, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # The .pth files in there, editable installs among them, are not read.
    (folder / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    shutil.move(folder / "others.pth", site)
    run(*pip, "--python", found, "install", *folder.glob("dist/*.whl"), *OFFLINE, cwd=folder)
    for name in ("dpo_plugin", "dpo_plugin_example"):
        assert run(found, "-c", f"import {name}; print({name}.__file__)", cwd=folder).startswith(site)
        assert (Path(site) / name / "py.typed").is_file()
    return found


def test_its_own_tests_pass(python, tmp_path):
    """Its types `make types` checks, against ours."""
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    shutil.copy(EXAMPLE / "pyproject.toml", tmp_path)
    assert " passed" in run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)


def test_the_tiny_recipe_trains_with_all_of_them(python, base_dir, sft_dir, tmp_path):
    """Format, reference, loss, metric, check and scorer: each is named in the run's own files."""
    owners = json.loads(run(python, "-m", "dpo_plugin", "plugins", "--json", cwd=tmp_path))
    theirs = {kind: name for kind, names in owners.items() for name, owner in names.items() if owner == "example"}
    assert theirs == {
        "formats": "helpsteer3",
        "reference_strategies": "halfway",
        "losses": "dpop",
        "metrics": "example/chosen_perplexity",
        "health_checks": "slowing_down",
        "scorers": "json_keys",
    }

    run(python, "-m", "dpo_plugin", "recipes", "tiny-dpo", "--copy", ".", cwd=tmp_path)
    source = tmp_path / "recipes/data/preferences.jsonl"
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()][:64]
    given = [
        {
            "context": row["chosen"][:-1],
            "response1": row["rejected" if number % 2 else "chosen"][-1]["content"],
            "response2": row["chosen" if number % 2 else "rejected"][-1]["content"],
            "overall_preference": 2 if number % 2 else -1,
        }
        for number, row in enumerate(rows)
    ]
    tied = {**given[0], "overall_preference": 0}
    data = tiny.write_rows(tmp_path / "rows.jsonl", [*given, tied])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Which order?", "keys": ["order"]}\n', encoding="utf-8")

    config = yaml.safe_load((tmp_path / "tiny-dpo.yaml").read_text("utf-8"))
    config |= {
        "base_model": str(base_dir),
        "lora_model_dir": str(sft_dir),
        "lora_r": 8,
        "lora_alpha": 16,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "dpo_plugin.helpsteer3"}],
        "test_datasets": None,
        "eval_strategy": "no",
        "save_strategy": "no",
        "save_total_limit": None,
        "num_epochs": 1,
        "logging_steps": 1,
        "dpo_loss_type": ["dpop"],
        "dpo_plugin": {
            "reference": {"strategy": "halfway"},
            "samples": {"prompts": "prompts.jsonl", "every_steps": 4, "max_new_tokens": 4, "scorer": "json_keys"},
        },
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run(python, "-m", "axolotl.cli.main", "train", "ours.yaml", "--launcher", "python", cwd=tmp_path)

    out = tmp_path / config["output_dir"]
    lines = [json.loads(line) for line in (out / "dpo_log.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert all(line["example/chosen_perplexity"] > 1 for line in lines if "loss" in line)
    assert any("samples/score" in line for line in lines)
    facts = (out / "README.md").read_text("utf-8")
    assert "dpop" in facts
    assert "halfway" in facts
    audit = json.loads((out / "data_audit.json").read_text("utf-8"))
    assert '"tie": 1' in json.dumps(audit)
    assert (out / "adapter_model.safetensors").is_file()
