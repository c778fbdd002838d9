"""Chat templates of the data, and the prompts of the section ``samples``, which are rendered as the data is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault

from dpo_plugin.config import DPOPluginConfig
from dpo_plugin.data.render import Renderer
from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.errors import ConfigError, RowError
from dpo_plugin.registry import get_registry
from dpo_plugin.samples.prompts import Prompt, read_prompts
from dpo_plugin.samples.scorers import CheckedScorer
from dpo_plugin.types import Message, PreferencePair, RenderedPair

KEY = "dpo_plugin.samples.prompts"


def renderer_of(
    cfg: Mapping[str, Any], entry: Mapping[str, Any], tokenizer: Any, refuse_special_tokens: bool
) -> Renderer:
    """Make the renderer of one dataset entry; its template comes before the config's and the tokenizer's own.

    The config is `RunSettings.template`, or the host's, which holds the same keys.
    """
    own = entry.get("chat_template") or ("jinja" if entry.get("chat_template_jinja") else None)
    choice = own or cfg.get("chat_template")
    return Renderer(
        tokenizer,
        get_chat_template_from_config(cfg, DictDefault({**entry, "chat_template": own}), tokenizer) if choice else None,
        name=f"chat_template {choice}" if choice else "the tokenizer's chat template",
        template_kwargs=cfg.get("chat_template_kwargs") or {},
        refuse_special_tokens=refuse_special_tokens,
    )


def check_samples(config: DPOPluginConfig, engine: EngineSettings, held_out: bool) -> None:
    """Check the section ``samples`` of a config that has evaluation data (`held_out`) or not.

    Raises:
        ConfigError: If the prompts are missing or cannot be read, the scorer is unknown or lacks something, or the
            model is split over ranks.
        ScorerError: If the scorer cannot judge answers to these prompts.
    """
    samples = config.samples
    if samples is None:
        return
    scorer = scorer_of(config)
    if engine.shards_parameters:
        raise refusal(engine.label)
    if samples.prompts != "eval":
        asked = [(prompt.question, prompt.row) for prompt in read_prompts(samples.prompts, KEY)]
    elif not held_out:
        raise ConfigError(
            f"`{KEY}: eval` takes its prompts from the evaluation data, and the config has none. Write: val_set_size: "
            "0.05, or prompts: <file>"
        )
    else:
        asked = [("a prompt of the evaluation data", {})]
    if scorer is not None:
        scorer.check(asked)


def scorer_of(config: DPOPluginConfig) -> CheckedScorer | None:
    """Make the scorer of the section ``samples``, if it names one.

    Raises:
        ConfigError: If nobody registered it, or the section ``pairs`` lacks what it needs.
    """
    name = None if config.samples is None else config.samples.scorer
    if name is None:
        return None
    return CheckedScorer.make(name, get_registry().scorers.find(name, "dpo_plugin.samples.scorer"), config.pairs)


def refusal(split: str) -> ConfigError:
    """The error for a model that `split` spreads over ranks."""
    return ConfigError(
        f"`dpo_plugin.samples` lets one rank answer, but with `{split}` no rank can run the model alone: all of them "
        "would have to generate every token in lock step. After training, `axolotl dpo compare <config.yaml>` "
        "does. Write: samples: null"
    )


def render_prompt(prompt: Prompt, renderer: Renderer, plain: bool, where: str) -> list[int]:
    """Render a prompt of a file as the training data's prompts are rendered, and give its token ids.

    Args:
        prompt: The prompt; a text is one message of the user.
        renderer: That of the first data set.
        plain: Whether that data set is of the type ``dpo_plugin.text``, whose prompts are read as they stand.
        where: What named the file, for messages.

    Raises:
        ConfigError: If the chat template refuses it, or there is none.
    """
    if plain and isinstance(prompt.content, str):
        text = renderer.render(RenderedPair(prompt.content, "", "")).prompt
    elif not renderer.template:
        raise ConfigError(f"{where}: the tokenizer has no chat template. Write: chat_template: chatml")
    else:
        try:
            text = renderer.text(prompt.messages, PreferencePair(prompt.messages, [], []), generate=True)
        except RowError as error:
            raise ConfigError(f"{where}: {error}. Write another prompt instead of {prompt.content!r}") from error
    return list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])


def check_rendered_as_trained(rows: Iterable[Mapping[str, Any]], renderer: Renderer, file: str) -> None:
    """Refuse prompts of a file where the data's prompts do not lead to an answer as the chat template does.

    Types of axolotl's own and third parties' formats bring texts of their own, into which no prompt of a file fits. One
    of the rows that is rendered by the template is enough.

    Raises:
        ConfigError: If none was.
    """
    if not renderer.template:
        return
    question = "dpoPluginQuestion"
    ask = [Message(role="user", content=question)]
    leads = renderer.text(ask, PreferencePair(ask, [], []), generate=True).rpartition(question)[2].strip()
    texts = [renderer.tokenizer.decode([*row["prompt_ids"], *row["chosen_ids"][:8]]) for row in rows]
    if texts and not any(leads in text[-len(leads) - 200 :] for text in texts):
        raise ConfigError(
            f"`{KEY}: {file}`: {renderer.name} writes {leads!r} before an answer, and the training data does not: its "
            f"first prompt ends with {texts[0][-60:]!r}. Its type brings another text. Write: prompts: eval"
        )
