"""``axolotl dpo preview``: pairs as the model will see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from dpo_plugin.plain_text import terminal_text

PROMPT, COMPLETION, SPECIAL, CUT = "dim", "bold", "bold magenta", "bold red"


def pair_record(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """One prepared pair as JSON-ready values: text, lengths in tokens, tokens cut."""
    record: dict[str, Any] = {"row": row["row"], "source": row["source"]}
    for index, side in enumerate(("prompt", "chosen", "rejected")):
        ids = row[f"{side}_ids"]
        record[side] = {"text": tokenizer.decode(ids), "tokens": len(ids), "cut_tokens": row["cut"][index]}
    return record


def pair_text(row: Mapping[str, Any], tokenizer: Any, truncation_side: str) -> list[Text]:
    """One prepared pair for the terminal: prompt dim, completions bright, special tokens and cuts marked."""
    lengths = {side: len(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")}
    tokens = ", ".join(f"{side} {length}" for side, length in lengths.items())
    source = f" · {row['source']}" if row["source"] else ""
    parts = [Text(f"── row {row['row']}{source} · tokens: {tokens}", style="cyan")]
    for index, side in enumerate(("prompt", "chosen", "rejected")):
        styled = ids_text(row[f"{side}_ids"], tokenizer, PROMPT if side == "prompt" else COMPLETION)
        if cut := row["cut"][index]:
            mark = Text(f" ✂ {cut} tokens cut ", style=CUT)
            at_front = side == "prompt" and truncation_side == "left"
            styled = mark + styled if at_front else styled + mark
        if side != "prompt":
            styled = Text(f"[{side}] ", style="green" if side == "chosen" else "red") + styled
        parts.append(styled)
    return parts


def ids_text(ids: Sequence[int], tokenizer: Any, style: str) -> Text:
    """Token ids as text, with special tokens in a style of their own."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    text = Text()
    for is_special, group in groupby(ids, key=special.__contains__):
        text.append(terminal_text(tokenizer.decode(list(group))), style=SPECIAL if is_special else style)
    return text
