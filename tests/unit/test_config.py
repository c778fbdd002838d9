"""The `dpo_plugin:` section: what the documentation writes is read, and an error ends with a line that is."""

import re

import pytest
import yaml

from dpo_plugin.config import parse_config
from dpo_plugin.errors import ConfigError
from tests.support.tiny import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sections(document):
    """Every ``dpo_plugin:`` section of the document's YAML blocks."""
    blocks = re.findall(r"```yaml\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
    found = [yaml.safe_load(block) for block in blocks]
    return [one["dpo_plugin"] for one in found if isinstance(one, dict) and "dpo_plugin" in one]


def documented_values():
    """Each key of those sections with its value, and with the others that its comment names."""
    for document in DOCUMENTS:
        for section in sections(document):
            for group, keys in section.items():
                for key, value in keys.items() if isinstance(keys, dict) else [(None, keys)]:
                    yield group, key, value
    for group, key, values in [
        ("reference", "strategy", "adapter base model ema none"),
        ("reference", "cache", "true false ./cache"),
        ("data", "truncation_side", "left right"),
        ("data", "special_tokens", "refuse allow"),
        ("compute", "prefix_sharing", "auto true false"),
        ("compute", "checkpoint_layers", "auto 0 12"),
        ("compute", "logits_chunk", "256"),
        ("loss", "f_divergence", "reverse_kl forward_kl js_divergence alpha_divergence"),
        ("loss", "ld_alpha", "1.0 0.5 5e-1"),
        ("health", "action", "warn stop off"),
        ("health", "checks", "{overfitting:\xa0stop,\xa0loss_diverged:\xa0off}"),
        ("samples", "prompts", "eval prompts.jsonl"),
        ("samples", "temperature", "0 0.7"),
        ("report", None, "true false"),
    ]:
        for text in values.split(" "):
            yield group, key, yaml.safe_load(text.replace("\xa0", " "))


@pytest.mark.parametrize(("group", "key", "value"), list(documented_values()))
def test_a_documented_value_is_read(group, key, value):
    read = getattr(parse_config({group: value if key is None else {key: value}}), group)
    read = read if key is None else getattr(read, key)
    if isinstance(value, dict):
        assert {name for name in value if name in str(read)} == set(value)
    else:
        assert read == ("off" if (key, value) == ("action", False) else float(value) if value == "5e-1" else value)


def test_the_page_of_settings_shows_every_section():
    (section,) = [one for one in sections(ROOT / "docs/settings.md") if len(one) > 1]
    assert set(section) == set(type(parse_config(None)).model_fields)


WRONG = [
    (["compute"], "`dpo_plugin` should be a valid mapping (found ['compute']). Write: dpo_plugin: {reference: {strategy: adapter}}"),
    ([], "`dpo_plugin` should be a valid mapping (found []). Write: dpo_plugin: {reference: {strategy: adapter}}"),
    ("", "`dpo_plugin` should be a valid mapping (found ''). Write: dpo_plugin: {reference: {strategy: adapter}}"),
    ({"reference": []}, "`dpo_plugin.reference` should be a valid mapping (found []). Write: reference: {strategy: adapter}"),
    ({3: 4}, "unknown key `dpo_plugin.3`. Known: compute, data, health, loading, loss, metrics, pairs, reference, report, samples. Write: compute: {max_tokens: 8192}"),
    ({"compute": {"max_token": 4}}, "unknown key `dpo_plugin.compute.max_token`. Known: checkpoint_layers, logits_chunk, master_weights, max_tokens, prefix_sharing. Write: max_tokens: 8192"),
    ({"compute": {"checkpoint_layers": -1}}, "`dpo_plugin.compute.checkpoint_layers` should be 'auto' or greater than or equal to 0 (found -1). Write: checkpoint_layers: auto"),
    ({"compute": {"checkpoint_layers": True}}, "`dpo_plugin.compute.checkpoint_layers` should be 'auto' or a valid integer (found True). Write: checkpoint_layers: auto"),
    ({"compute": {"max_tokens": "3"}}, "`dpo_plugin.compute.max_tokens` should be a valid integer (found '3'). Write: max_tokens: 8192"),
    ({"reference": {"ema_steps": True}}, "`dpo_plugin.reference.ema_steps` should be a valid integer (found True). Write: ema_steps: 512"),
    ({"reference": {"ema_alpha": "0.5"}}, "`dpo_plugin.reference.ema_alpha` should be a valid number (found '0.5'). Write: ema_alpha: 0.6"),
    ({"reference": {"adapter_dir": " "}}, "`dpo_plugin.reference.adapter_dir` should not be blank (found ' '). Write: adapter_dir: ./SFT_LoRA"),
    ({"reference": {"cache": ""}}, "`dpo_plugin.reference.cache` should be a valid boolean or should not be blank (found ''). Write: cache: true"),
    ({"data": {"roles": {"visitor": "usr"}}}, "`dpo_plugin.data.roles.visitor` should be 'system', 'user', 'assistant', 'tool' or 'developer' (found 'usr'). Write: roles: {visitor: user}"),
    ({"data": {"columns": {"chosen": " "}}}, "`dpo_plugin.data.columns.chosen` should not be blank (found ' '). Write: chosen: chosen"),
    ({"loss": {"f_alpha": float("nan")}}, "`dpo_plugin.loss.f_alpha` should be a finite number (found nan). Write: f_alpha: 0.5"),
    ({"samples": {"temperature": float("inf")}}, "`dpo_plugin.samples.temperature` should be a finite number (found inf). Write: temperature: 0.0"),
    ({"metrics": [3]}, "`dpo_plugin.metrics[0]` should be a valid string (found 3). Write: metrics: [logratios/margin_per_token]"),
    ({"report": 1}, "`dpo_plugin.report` should be a valid boolean (found 1). Write: report: true"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "says"), WRONG)
def test_a_wrong_value_names_the_line_to_write(section, says):
    with pytest.raises(ConfigError) as error:
        parse_config(section)
    assert str(error.value) == says


@pytest.mark.parametrize(
    "section", [{"x" * 9000: 1}, {"reference": {"strategy": ["x" * 9000]}}, {"metrics": "m" * 9000}]
)
def test_a_message_stays_short(section):
    with pytest.raises(ConfigError, match="Write: ") as error:
        parse_config(section)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("section", "says"), WRONG)
def test_the_line_to_write_is_read(section, says):
    line = yaml.safe_load(says.rpartition("Write: ")[2])
    path = re.search(r"`dpo_plugin\.?([\w.]*)", says).group(1).split(".")
    for key in reversed(path[:-1] if path[-1] not in line else path[: path.index(next(iter(line)))]):
        if key not in line:
            line = {key: line}
    parse_config(line.get("dpo_plugin", line))
