"""What the config of a base model decides: one that sees trains on text, and what cannot be trained is refused."""

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.log import LOG
from tests.support import bases, forked, host, tiny
from tests.support.architectures import make_config
from tests.support.tiny import ROOT, dpo_config

TEXT_LAYERS = ".*language_model.*_proj"
RUN = {"max_steps": 2, "save_strategy": "no", "save_steps": None}


@pytest.fixture(scope="module")
def seeing_dir(tmp_path_factory):
    return bases.save("google", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def text_dir(seeing_dir, tmp_path_factory):
    """The text part of that base as a model of its own."""
    folder = tmp_path_factory.mktemp("gemma3_text")
    seeing = AutoModelForCausalLM.from_pretrained(seeing_dir)
    text = Gemma3ForCausalLM(seeing.config.text_config)
    text.model.load_state_dict(seeing.model.language_model.state_dict())
    text.lm_head.load_state_dict(seeing.lm_head.state_dict())
    text.save_pretrained(folder)
    bases.tokenizer("google").save_pretrained(folder)
    return folder


def test_a_base_that_sees_trains_as_its_text_part_and_says_so_once(seeing_dir, text_dir, tmp_path, monkeypatch):
    shape = {"r": 8, "lora_alpha": 16}
    sft = {
        seeing_dir: tiny.save_adapter(seeing_dir, tmp_path / "seeing", target_modules=TEXT_LAYERS, **shape),
        text_dir: tiny.save_adapter(text_dir, tmp_path / "text", **shape),
    }
    curves = {}
    for base, folder in sft.items():
        said = []
        monkeypatch.setattr(LOG, "info", lambda text, *_, said=said, **__: said.append(text))
        more = {"lora_model_dir": str(folder), "lora_target_modules": TEXT_LAYERS if base == seeing_dir else None}
        config = dpo_config(base, tmp_path / f"out-{folder.name}", **RUN, **more)
        run = host.train(config, tmp_path / f"run-{folder.name}")
        assert sum("trained on text alone" in text for text in said) == (base == seeing_dir)
        curves[base] = run.lines
        trained = [name for name, _ in run.trainer.model.policy_parameters()]
        assert trained
        assert not any("vision" in name for name in trained)
        assert type(run.trainer.model.get_base_model()).__name__ == (
            "Gemma3ForConditionalGeneration" if base == seeing_dir else "Gemma3ForCausalLM"
        )
    for seeing, text in zip(curves[seeing_dir], curves[text_dir], strict=True):
        for field in ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "grad_norm"):
            assert seeing[field] == pytest.approx(text[field], rel=1e-5, abs=1e-6), field
    assert curves[seeing_dir][1]["loss"] < curves[seeing_dir][0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_merge_lora_merges_into_a_base_that_sees_as_the_recipe_asks(seeing_dir, tmp_path):
    """Without its ``merge_method`` the host's merge (0.19 to 0.21) matches no tensor and saves the base as it was."""
    recipe = yaml.safe_load((ROOT / "recipes/gemma3-12b-dpo.yaml").read_text(encoding="utf-8"))
    targets = recipe["lora_target_modules"]
    trained = tiny.save_adapter(seeing_dir, tmp_path / "out", target_modules=targets)
    settings = dpo_config(seeing_dir, trained, lora_target_modules=targets, merge_method=recipe["merge_method"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = forked.run(["axolotl", "merge-lora", str(tmp_path / "config.yaml")])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    base = AutoModelForCausalLM.from_pretrained(seeing_dir)
    expected = dict(PeftModel.from_pretrained(base, str(trained)).merge_and_unload().named_parameters())
    for name, found in AutoModelForCausalLM.from_pretrained(trained / "merged").named_parameters():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)


def test_a_hybrid_model_that_must_share_prefixes_is_refused_before_weights_are_read(tmp_path):
    make_config("qwen3_next", vocab_size=len(tiny.tokenizer())).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    more = {"dpo_plugin": {"compute": {"prefix_sharing": True}}, "lora_target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"linear_attention.*hand on a state .*prefix_sharing: true.*Write: auto$"):
        host.train(dpo_config(tmp_path / "base", tmp_path / "out", **RUN, **more), tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, r"Write: model_quantization_config: Mxfp4Config, model_quantization_config_kwargs: {dequantize: true}$"),
        ({"model_quantization_config": "Mxfp4Config"}, r"has no backward and cannot carry LoRA. Write: model_quant"),
        ({"adapter": "qlora", "load_in_4bit": True}, r"in MXFP4 already. Write: adapter: lora, load_in_4bit: false, "),
    ],
)
def test_a_base_in_mxfp4_that_is_not_dequantised_is_refused_before_weights_are_read(tmp_path, keys, line):
    base = bases.save("openai", tmp_path)
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=line):
        host.train(dpo_config(base, tmp_path / "out", **RUN, **keys), tmp_path / "run")


def test_merge_lora_into_a_base_in_mxfp4_is_refused(tmp_path):
    """The host (0.19, 0.21) ends with 0, and the model that it saves has no experts."""
    base = bases.save("openai", tmp_path / "base")
    trained = tiny.save_adapter(base, tmp_path / "out", target_modules=["q_proj", "v_proj"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dpo_config(base, trained, lora_target_modules=["q_proj"])))
    done = forked.run(["axolotl", "merge-lora", str(tmp_path / "config.yaml")])
    assert done.returncode != 0
    assert "is in MXFP4, and axolotl would merge into a model without its experts" in done.stdout + done.stderr
    assert not (trained / "merged").exists()
