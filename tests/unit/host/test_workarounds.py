"""Faults of the host that are worked around: each still there, and the workaround no wider than the fault."""

import inspect

import pytest
import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.kernels.lora import get_lora_parameters
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from dpo_plugin.host import workarounds
from dpo_plugin.host.plugin import TRAINER
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import POLICY, REFERENCE, attach

pytestmark = pytest.mark.core
QLORA = {
    "base_model": "x",
    "rl": "dpo",
    "datasets": [{"path": "a", "type": "chat_template.default"}],
    "adapter": "qlora",
    "load_in_4bit": True,
    "fsdp_version": 2,
    "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"},
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-5,
}
REFUSED = "FSDP2 does not support load_in_8bit or load_in_4bit"


def schema():
    """As the host builds it for a config, once plugins are registered."""
    return type("Schema", (AxolotlInputConfig,), {})


def test_fsdp2_with_nf4_is_refused_by_the_host_and_accepted_for_our_trainer_alone():
    with pytest.raises(ValidationError, match=REFUSED):
        schema().model_validate(QLORA)
    workarounds.accept_fsdp2_with_nf4(TRAINER)
    assert schema().model_validate({**QLORA, "trainer_cls": TRAINER}).fsdp_version == 2
    for other in ({}, {"trainer_cls": TRAINER, "adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}):
        with pytest.raises(ValidationError, match=REFUSED):
            schema().model_validate({**QLORA, **other})


def test_the_hosts_own_micro_step_is_there_for_its_garbage_collection_alone():
    """axolotl 0.19 and 0.20 have one, later hosts none; a step that did more would be left out with it."""
    own = vars(AxolotlDPOTrainer).get("training_step")
    lines = inspect.getsource(own).partition(") -> torch.Tensor:\n")[2].split("\n") if own else []
    said = [line.strip() for line in lines if line.strip()]
    assert said in (
        [],
        [
            "loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)",
            "gc.collect()",
            "torch.cuda.empty_cache()",
            "return loss",
        ],
    )


def test_the_hosts_fused_kernels_read_the_adapter_that_is_switched_to(base_dir, sft_dir):
    """axolotl 0.21 attaches them to the trainer's model where the YAML asks for `lora_o_kernel` and its like."""
    folder = AdapterFolder.open(sft_dir, "lora_model_dir")
    model = attach(AutoModelForCausalLM.from_pretrained(base_dir), folder, folder)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")

    def reads():
        return get_lora_parameters(layer)[3]

    assert reads() is layer.lora_A[POLICY].weight
    with model.reference_active():
        assert reads() is layer.lora_A[REFERENCE].weight
    with model.adapters_off():
        assert reads() is None
        assert torch.equal(get_lora_parameters(layer)[0], layer.base_layer.weight)
    assert reads() is layer.lora_A[POLICY].weight
