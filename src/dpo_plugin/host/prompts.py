"""The prompts of the section ``samples``: checked before a model is loaded, rendered as the training data is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from axolotl.integrations.base import PluginManager

from dpo_plugin.config import DPOPluginConfig
from dpo_plugin.engines.config import engine_that_shards
from dpo_plugin.errors import ConfigError, RowError
from dpo_plugin.host.templates import renderer_of
from dpo_plugin.samples.records import read_prompts
from dpo_plugin.types import Message, PreferencePair, RenderedPair

KEY = "dpo_plugin.samples.prompts"


def check_samples(cfg: Mapping[str, Any], config: DPOPluginConfig) -> None:
    """Check the section ``samples`` of a raw config.

    Raises:
        ConfigError: If the prompts are missing or cannot be read, or the model is split over ranks.
    """
    if config.samples is None:
        return
    if engine := engine_that_shards(cfg):
        raise refusal(engine)
    if config.samples.prompts != "eval":
        read_prompts(config.samples.prompts, KEY)
    elif not cfg.get("test_datasets") and not cfg.get("val_set_size"):
        raise ConfigError(
            f"`{KEY}: eval` takes its prompts from the evaluation data, and the config has none. Write: val_set_size: "
            "0.05, or prompts: <file>"
        )


def refusal(split: str) -> ConfigError:
    """The error for a model that is split over ranks.

    Args:
        split: What splits it.
    """
    return ConfigError(
        f"`dpo_plugin.samples` lets one rank answer, but with `{split}` no rank can run the model alone: all of them "
        "would have to generate every token in lock step. After training, `axolotl dpo compare <config.yaml>` "
        "does. Write: samples: null"
    )


def render_prompt(
    prompt: str | list[Message], tokenizer: Any, datasets: Sequence[Mapping[str, Any]], file: str
) -> list[int]:
    """Token ids of a prompt of a file, as the training data's prompts are rendered.

    A text is one message of the user, unless the first data set is of the type ``dpo_plugin.text``, whose prompts are
    read as they stand.

    Raises:
        ConfigError: If the chat template refuses it, or there is none.
    """
    cfg = PluginManager.get_instance().cfg
    entry = datasets[0] if datasets else {}
    as_it_stands = isinstance(prompt, str) and entry.get("type") == "dpo_plugin.text"
    renderer = renderer_of(cfg, entry, tokenizer, refuse_special_tokens=True)
    if as_it_stands:
        text = renderer.render(RenderedPair(str(prompt), "", "")).prompt
    elif not renderer.template:
        raise ConfigError(f"`{KEY}: {file}`: the tokenizer has no chat template. Write: chat_template: chatml")
    else:
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        try:
            text = renderer.text(messages, PreferencePair(messages, [], []), generate=True)
        except RowError as error:
            raise ConfigError(f"`{KEY}: {file}`: {error}. Write another prompt instead of {prompt!r}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_rendered_as_trained(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, datasets: Sequence[Mapping[str, Any]], file: str
) -> None:
    """Refuse prompts of a file where the data's prompts do not lead to an answer as the chat template does.

    Types of axolotl's own and third parties' formats bring texts of their own, into which no prompt of a file fits. One
    of the rows that is rendered by the template is enough.

    Raises:
        ConfigError: If none was.
    """
    renderer = renderer_of(PluginManager.get_instance().cfg, datasets[0], tokenizer, refuse_special_tokens=True)
    if not renderer.template:
        return
    question = "dpoPluginQuestion"
    ask = [Message(role="user", content=question)]
    leads = renderer.text(ask, PreferencePair(ask, [], []), generate=True).rpartition(question)[2].strip()
    texts = [tokenizer.decode([*row["prompt_ids"], *row["chosen_ids"][:8]]) for row in rows]
    if texts and not any(leads in text[-len(leads) - 200 :] for text in texts):
        raise ConfigError(
            f"`{KEY}: {file}`: {renderer.name} writes {leads!r} before an answer, and the training data does not: its "
            f"first prompt ends with {texts[0][-60:]!r}. Its type brings another text. Write: prompts: eval"
        )
