"""A whole run against TRL's own `DPOTrainer`: the same adapter, ids, order and settings give the same weights."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.support import host
from tests.support.tiny import dpo_config

pytestmark = pytest.mark.core
STEPS, BOUND = 14, 1e-5
SETTINGS = {
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.4,
    "gradient_accumulation_steps": 8,
    "micro_batch_size": 2,
    "max_steps": STEPS,
    "save_strategy": "no",
    "save_steps": None,
}


class OnTokenIds(DPOTrainer):
    """TRL's trainer as it is; TRL 1.9 to 1.14 would tokenise ids again."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


@pytest.fixture(scope="module")
def ours(base_dir, sft_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return host.train(dpo_config(base_dir, folder / "out", lora_model_dir=str(sft_dir), **SETTINGS), folder)


@pytest.fixture(scope="module")
def theirs(ours, base_dir, sft_dir, tokenizer, tmp_path_factory):
    """TRL keeps a frozen copy of the adapter, called "ref", as its reference."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(sft_dir), is_trainable=True)
    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("theirs")),
        beta=0.1,
        max_length=None,
        per_device_train_batch_size=SETTINGS["micro_batch_size"],
        gradient_accumulation_steps=SETTINGS["gradient_accumulation_steps"],
        max_steps=STEPS,
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type=SETTINGS["lr_scheduler"],
        warmup_steps=SETTINGS["warmup_steps"],
        weight_decay=SETTINGS["weight_decay"],
        max_grad_norm=SETTINGS["max_grad_norm"],
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=42,
    )
    ids = ours.trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    trainer = OnTokenIds(model, args=args, train_dataset=ids, processing_class=copy.deepcopy(tokenizer))
    trainer.train()
    return trainer


def logged(trainer, name):
    return torch.tensor([line[name] for line in trainer.state.log_history if "loss" in line], dtype=torch.float64)


def test_losses_and_gradient_norms_of_each_step_are_those_of_trl(ours, theirs):
    largest = {}
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "logps/rejected"):
        found, expected = logged(ours.trainer, name), logged(theirs, name)
        assert len(found) == len(expected) == STEPS
        largest[name] = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    print(largest)
    assert max(largest.values()) <= BOUND
    assert (logged(theirs, "grad_norm") > SETTINGS["max_grad_norm"]).all()  # every step is clipped
    assert logged(theirs, "loss")[-1] < 0.6


def test_the_trained_adapter_is_that_of_trl(ours, theirs, sft_dir, tmp_path):
    theirs.model.save_pretrained(str(tmp_path), selected_adapters=["default"])
    found, expected, start = (
        load_file(folder / "adapter_model.safetensors") for folder in (ours.output_dir, tmp_path, sft_dir)
    )
    assert found.keys() == expected.keys() == start.keys()
    apart = max((found[key] - expected[key]).abs().max().item() for key in start)
    moved = max((expected[key] - start[key]).abs().max().item() for key in start)
    print({"apart": apart, "moved": moved})
    assert apart <= BOUND
    assert moved > 100 * BOUND
