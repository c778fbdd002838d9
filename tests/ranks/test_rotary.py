"""ZeRO-3 on a 16-bit base computes positions as one process does, as far out as the model was trained for."""

import pytest
import torch

from tests.ranks.shipped import BF16, config
from tests.support import tiny
from tests.support.cpu_ranks import launch
from tests.support.tiny import chat_row, write_rows

LONG = 2048


@pytest.fixture(scope="module")
def positional(tmp_path_factory):
    """A base whose attention hangs on distances: q and k are their biases and little else, and values weigh much."""
    model = tiny.assets().make_model(len(tiny.tokenizer()), tiny.tokenizer())
    model.config.num_attention_heads = 2
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    torch.manual_seed(0)
    model = type(model)(model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                parameter.normal_(0, 3)
            elif "self_attn" in name:
                parameter.mul_(0.1 if "q_proj" in name or "k_proj" in name else 6)
    folder = tmp_path_factory.mktemp("positional")
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_zero3_in_bf16_sees_far_positions_as_one_process_does(positional, tmp_path):
    adapter = tiny.save_adapter(positional, tmp_path / "sft", r=16, lora_alpha=16)
    words = torch.randint(5, 250, (2, 1200), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [chat_row(tiny.tokenizer().decode(row), "It is seven.", "No idea.") for row in words]
    assert min(len(tiny.tokenizer().encode(row["prompt"])) for row in rows) >= LONG
    data = {"path": str(write_rows(tmp_path / "long.jsonl", rows)), "ds_type": "json", "type": "dpo_plugin.chat"}
    logps = []
    for ranks in (1, 2):
        settings = {
            **BF16,
            "datasets": [{**data, "split": "train"}],
            **dict.fromkeys(("test_datasets", "eval_strategy", "eval_steps", "save_steps")),
            "save_strategy": "no",
            "sequence_len": 2 * LONG,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 2 // ranks,
            "dpo_plugin": {"reference": {"cache": False}},
            "max_steps": 1,
            **({"deepspeed": None} if ranks == 1 else {}),
        }
        folder = tmp_path / str(ranks)
        run = launch(config("zero3-nf4", positional, adapter, folder, **settings), folder, ranks=ranks)
        assert run.returncode == 0, run.error()
        logps.append([run.lines[0][f"logps/{side}_per_token"] for side in ("chosen", "rejected")])
    print(f"\nnats per token of one process {logps[0]}, of ZeRO-3 {logps[1]}")
    assert logps[1] == pytest.approx(logps[0], abs=5e-3)
