"""Make the tiny base model and tokenizer of the demo and the tests: no download, about two minutes on two cores.

The base is a 4-layer Qwen2 with Qwen2.5's chat template and a byte-level BPE tokenizer. It is trained from scratch
on the texts in ``recipes/data``, where every question occurs with a courteous and with a curt answer, so that it
knows both manners and prefers neither.

    python examples/tiny_assets.py outputs/tiny-base [--steps 700]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DATA = Path(__file__).parents[1] / "recipes" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def conversations() -> list[list[dict[str, str]]]:
    """Every conversation of the training sets, with each of its answers."""
    rows = [json.loads(line) for line in (DATA / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[side] for row in rows for side in ("chosen", "rejected")]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2.5's chat template as axolotl ships it."""
    from axolotl.utils.chat_templates import get_chat_template

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=get_chat_template("qwen_25"),
    )


def make_model(vocabulary: int, tokenizer: PreTrainedTokenizerFast, layers: int = 4) -> Qwen2ForCausalLM:
    """A Qwen2 of about two million parameters, if it has four layers."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def train(model: Qwen2ForCausalLM, rows: list[list[int]], steps: int, batch_size: int = 16) -> float:
    """Train on whole conversations; returns the last loss in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    order = random.Random(0)
    smoothed = 0.0
    for step in range(steps):
        batch = sorted(order.sample(rows, 4 * batch_size), key=len)
        start = order.randrange(4) * batch_size  # rows of similar length, so that little is padded
        batch = batch[start : start + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
        # A seventh of the input tokens are wrong, ever fewer and none in the last steps: a model that knows whole rows
        # by heart learns the manner of those rows alone.
        wrong = (torch.rand(ids.shape) < max(0, 1 - step / (0.95 * steps)) / 7) & (ids >= len(SPECIAL))
        noisy = torch.where(wrong, torch.randint(len(SPECIAL), model.config.vocab_size, ids.shape), ids)
        loss = model(input_ids=noisy, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        if step % 100 == 0:
            print(f"tiny base: step {step}/{steps}, loss {smoothed:.3f}", flush=True)
    return smoothed


def main() -> None:
    """Write model and tokenizer to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    chats = conversations()
    tokenizer = make_tokenizer([message["content"] for chat in chats for message in chat])
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    model = make_model(len(tokenizer), tokenizer)
    print(f"tiny base: {model.num_parameters():,} parameters, {len(rows)} conversations, {len(tokenizer)} tokens")
    loss = train(model, rows, arguments.steps) if arguments.steps else float("nan")
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"tiny base: loss {loss:.3f} nats/token, {time.perf_counter() - started:.0f} s, in {arguments.output}")


if __name__ == "__main__":
    main()
