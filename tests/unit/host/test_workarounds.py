"""Faults of the host that are worked around: each still there, and the workaround no wider than the fault."""

import pytest
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import ValidationError

from dpo_plugin.host import workarounds
from dpo_plugin.host.plugin import TRAINER

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
