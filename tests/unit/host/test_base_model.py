"""Which bases are mapped from a copy in 4 bits, and which the host loads in its own way."""

from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from transformers import BitsAndBytesConfig

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.base_model import _cannot_be_mapped, check_base

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def loader(storage="bfloat16", computed=torch.bfloat16):
    quantisation = BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage=storage)
    return SimpleNamespace(
        cfg=SimpleNamespace(torch_dtype=computed),
        base_model="base",
        model_kwargs={"quantization_config": quantisation},
    )


@pytest.mark.parametrize(
    ("given", "stored", "files", "why"),
    [
        (loader(), None, ["a"], None),
        (loader("uint8", torch.float16), None, ["a"], None),
        (loader(computed=torch.float32), None, ["a"], "`bnb_4bit_quant_storage: bfloat16` would be read as float32"),
        (loader("float32"), None, ["a"], "`bnb_4bit_quant_storage: float32` would be read as bfloat16"),
        (loader(), None, [], "`base_model: base` has no safetensors"),
        (loader(), {"quant_method": "gptq"}, ["a"], "its weights are stored by gptq"),
        (loader(), {"quant_method": "bitsandbytes", "load_in_8bit": True}, ["a"], "its weights are stored by bitsa"),
        (loader(), BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage="bfloat16"), ["a"], None),
        (loader(), {"quant_method": "bitsandbytes", **NF4, "bnb_4bit_quant_storage": "float32"}, ["a"], "`bnb_4bit_q"),
    ],
)
def test_a_base_whose_bytes_would_not_be_kept_is_left_to_the_host(given, stored, files, why):
    found = _cannot_be_mapped(given, stored, files)
    assert found is None if why is None else found.startswith(why)


@pytest.mark.parametrize("key", ["base_model", "base_model_config"])
@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "nothing"}', "["])
def test_a_base_without_a_config_that_transformers_knows_is_refused(tmp_path, key, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"^`{key}: {tmp_path}` cannot be used: .+ Write: {key}: <a folder with"):
        check_base(DictDefault(**{key: str(tmp_path)}), SimpleNamespace())
