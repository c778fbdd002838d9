"""The ``dpo_plugin:`` section of an axolotl config; every key is optional, unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUseDefault

from dpo_plugin.errors import ConfigError
from dpo_plugin.validation import Folder, Number, Text, message


class _Section(BaseModel):
    """Strict, because text for a number or ``true`` for 1 is a slip; ``examples`` are the lines that errors propose."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _subsection(kind: type[_Section], **example: Any) -> Any:
    """The field of a section, whose docstring describes it."""
    return Field(default_factory=kind, examples=[example], description=kind.__doc__)


class ReferenceConfig(_Section):
    """Where the reference's log-probs come from."""

    strategy: Text | None = Field(
        default=None,
        examples=["adapter"],
        description="adapter, base, model, ema, none, or any registered reference strategy. Default: adapter if "
        "lora_model_dir is set, base for a fresh LoRA, model for full fine-tuning.",
    )
    adapter_dir: Text | None = Field(
        default=None,
        examples=["./SFT_LoRA"],
        description="Folder of the reference adapter, for strategy: adapter or ema. Default: lora_model_dir.",
    )
    cache: bool | Folder | None = Field(
        default=None,
        examples=[True],
        description="Keep the reference's log-probs on disk: true (next to dataset_prepared_path), false, or a folder. "
        "Default: true for a reference that stays as it is.",
    )
    ema_alpha: Number = Field(
        default=0.6,
        gt=0,
        le=1,
        description="Strategy ema: share of the policy that an update mixes into the reference.",
    )
    ema_steps: int = Field(default=512, ge=1, description="Strategy ema: optimizer steps between updates.")


def _null_is_default(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


_Column = Annotated[Text, BeforeValidator(_null_is_default, json_schema_input_type=Text | None)]


class ColumnsConfig(_Section):
    """Column names of the data, where they differ from the usual; each is a column of every data set."""

    chosen: _Column = Field(default="chosen", description="Preferred conversation or answer.")
    rejected: _Column = Field(default="rejected", description="The other one.")
    prompt: _Column = Field(default="prompt", description="Prompt, text or messages.")
    messages: _Column = Field(default="messages", description="Shared history.")
    question: _Column = Field(default="question", description="Question.")
    system: _Column = Field(default="system", description="System message; may be absent or empty.")
    source: _Column = Field(default="source", description="Where a row comes from; may be absent.")
    tools: _Column = Field(default="tools", description="Tool definitions; may be absent.")
    template_kwargs: _Column = Field(
        default="chat_template_kwargs", description="Chat template arguments of a row; may be absent."
    )
    role: _Column = Field(default="role", description="Key of a message's role; ShareGPT's from is known too.")
    content: _Column = Field(default="content", description="Key of a message's text; ShareGPT's value is known too.")


Role = Literal["system", "user", "assistant", "tool", "developer"]


class DataConfig(_Section):
    """How preference data is read."""

    columns: ColumnsConfig = _subsection(ColumnsConfig, chosen="best")
    roles: dict[Text, Role] = Field(
        default_factory=dict,
        examples=[{"visitor": "user"}],
        description="Role names in the data → system, user, assistant, tool or developer, besides the known ones.",
    )
    truncation_side: Literal["left", "right"] = Field(
        default="right",
        description="With excess_length_strategy: truncate, cut the end of completions (right) or the beginning of "
        "prompts (left).",
    )
    special_tokens: Literal["refuse", "allow"] = Field(
        default="refuse",
        description="A row whose text contains a special token such as <|im_end|>: refuse it, or allow the tokenizer "
        "to turn it into that control token.",
    )
    sample_fraction: Number = Field(
        default=1.0, gt=0, le=1, description="Share of each data set's rows that is used, drawn with the config's seed."
    )
    max_bad_rows: Number = Field(
        default=0.1, ge=0, le=1, description="Share of unusable rows of a data set above which the run stops."
    )


class LossConfig(_Section):
    """Settings of the loss besides axolotl's rl_beta, dpo_loss_type, dpo_loss_weights and dpo_label_smoothing."""

    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="Divergence between policy and reference. Plain DPO: reverse_kl."
    )
    f_alpha: Number = Field(default=0.5, description="α of alpha_divergence; 1 is the reverse KL.")
    ld_alpha: Number | None = Field(
        default=None,
        examples=[0.5],
        ge=0,
        le=1,
        description="LD-DPO: weight of the tokens beyond the length of the pair's shorter answer. Default: 1.",
    )
    discopop_tau: Number = Field(default=0.05, gt=0, description="Temperature of the loss discopop.")
    router_aux_loss_coef: Number | None = Field(
        default=None,
        examples=[0.001],
        ge=0,
        description="Weight of the model's own load-balancing loss of the policy's routers, added to the loss of a "
        "mixture of experts. Default: none.",
    )


class ComputeConfig(_Section):
    """How a step is computed; nothing here but ``master_weights`` changes its result."""

    prefix_sharing: Literal["auto"] | bool = Field(
        default="auto",
        description="Compute what chosen and rejected begin with once, in one row without padding. auto: where "
        "a few pairs give what they give in two rows, and no attn_implementation but eager is asked for by name; true: "
        "or stop; false: two padded rows per pair.",
    )
    logits_chunk: int | None = Field(
        default=None,
        examples=[256],
        ge=1,
        description="Completion tokens whose logits are held at a time. Default: 64 MiB of fp32 logits.",
    )
    max_tokens: int | None = Field(
        default=None,
        examples=[8192],
        ge=1,
        description="Most tokens in one forward. A micro-batch that has more is split over several forwards and "
        "backwards, with the same gradient, so micro_batch_size can be all pairs of a step. Default: no limit.",
    )
    checkpoint_layers: Literal["auto"] | Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        examples=["auto"],
        description="With gradient_checkpointing: how many decoder layers are checkpointed. auto: as few as the GPU's "
        "memory allows for the longest micro-batch; where that is unknown, all. Default: all.",
    )
    master_weights: bool = Field(
        default=True,
        description="Full fine-tuning in bf16: the optimizer updates fp32 copies of the weights, as under DeepSpeed, "
        "for 4 bytes per trained value, 4 more of AdamW's states in fp32, and in its step 2 more of gradients. false: "
        "it updates the bf16 weights, of which a learning rate of 5e-7 moves 2 in 100; not under DeepSpeed.",
    )


Action = Annotated[Literal["warn", "stop", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
"""What happens on a finding; YAML 1.1 reads ``off`` as false."""


class HealthConfig(_Section):
    """What happens when a health check finds something."""

    action: Action = Field(
        default="warn", description="warn: say it and go on; stop: save and stop the run; off: do not look."
    )
    checks: dict[Text, Action] = Field(
        default_factory=dict,
        examples=[{"overfitting": "stop"}],
        description="Another action for single checks, by name.",
    )


class SamplesConfig(_Section):
    """Answers of policy and reference side by side, during training and in ``axolotl dpo compare``."""

    prompts: Text = Field(
        default="eval",
        description="eval: the prompts of the first pairs of the evaluation data; or a file, JSON lines with prompt "
        "(text) or messages (chat), or plain text with one prompt per line.",
    )
    count: int = Field(default=4, ge=1, description="With prompts: eval, how many different prompts.")
    every_steps: int = Field(default=100, ge=1, description="Optimizer steps between samples; also at the last step.")
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    temperature: Number = Field(
        default=0.0, ge=0, description="0: the likeliest token each time (greedy). Above: answers are drawn with it."
    )
    scorer: Text | None = Field(
        default=None, examples=["rule"], description="Judges both answers, set up in `pairs`. Default: none does."
    )


class PairsConfig(_Section):
    """Pairs that ``axolotl dpo pairs`` makes of a model's own answers."""

    answers: int = Field(default=4, ge=1, description="Answers per prompt and model.")
    temperature: Number = Field(default=1.0, ge=0, description="Answers are drawn with it; 0: the likeliest token.")
    top_p: Number = Field(default=1.0, gt=0, le=1, description="Share of probability that tokens are drawn from.")
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer; longer ones are left out.")
    batch_size: int = Field(default=16, ge=1, description="Answers that are generated and scored at a time.")
    scorer: Text = Field(
        default="rule", description="rule, length, command, reward_model, or any registered scorer; more is better."
    )
    command: Text | None = Field(
        default=None,
        examples=["python score.py"],
        description="Scorer command: reads a JSON object per line with prompt, answer and the prompt's other keys, "
        "and prints a number per line. Started for each batch.",
    )
    reward_model: Text | None = Field(
        default=None,
        examples=["./reward-model"],
        description="Scorer reward_model: a sequence-classification model with one output.",
    )
    timeout: Number = Field(default=600.0, gt=0, description="Seconds that the command may take for a batch.")
    gap: Number = Field(default=0.0, ge=0, description="Chosen's score is more than this above rejected's.")
    pair: Literal["best_worst", "best_random", "each"] = Field(
        default="best_worst",
        description="The best answer with the worst, or with one drawn of the others; each: the best with the worst, "
        "the next best with the next worst, and so on.",
    )


class DPOPluginConfig(_Section):
    """The ``dpo_plugin:`` section."""

    reference: ReferenceConfig = _subsection(ReferenceConfig, strategy="adapter")
    data: DataConfig = _subsection(DataConfig, sample_fraction=1.0)
    loss: LossConfig = _subsection(LossConfig, ld_alpha=0.5)
    compute: ComputeConfig = _subsection(ComputeConfig, max_tokens=8192)
    health: HealthConfig = _subsection(HealthConfig, action="warn")
    loading: Literal["sharded", "host"] | None = Field(
        default=None,
        examples=["sharded"],
        description="How a 4-bit base gets onto GPUs that ZeRO-3 or FSDP2 shards it over: sharded, layer by layer "
        "from a copy in 4 bits that is kept next to dataset_prepared_path, or host, whole onto each GPU first, as the "
        "host does. Default: sharded where it can be.",
    )
    report: bool = Field(default=True, description="Write report.html into output_dir at the end of the run.")
    metrics: list[Text] | None = Field(
        default=None,
        examples=[["logratios/margin_per_token"]],
        description="Names of registered metrics to log along with the usual ones. Default: all registered.",
    )
    samples: SamplesConfig | None = Field(
        default=None,
        examples=[{"every_steps": 100}],
        description="Answers of policy and reference during training. Default: none.",
    )
    pairs: PairsConfig = _subsection(PairsConfig, scorer="rule")


class DPOPluginArgs(BaseModel):
    """What is mixed into axolotl's config schema: one nested key, so that nothing of the host's is shadowed."""

    dpo_plugin: DPOPluginConfig | None = Field(
        default=None, examples=[{"reference": {"strategy": "adapter"}}], description="Settings of dpo_plugin."
    )


def parse_config(section: Any) -> DPOPluginConfig:
    """Read the ``dpo_plugin:`` section.

    Args:
        section: The raw value from the YAML; None means all defaults.

    Raises:
        ConfigError: Naming the key, and for an unknown key the known ones.
    """
    try:
        return DPOPluginArgs(dpo_plugin=section).dpo_plugin or DPOPluginConfig()
    except ValidationError as error:
        raise ConfigError(message(error, DPOPluginArgs)) from error


def asks_for_plugin(cfg: Any) -> bool:
    """Whether a raw config names us: axolotl 0.21 registers an installed plugin for every config."""
    entries = [entry for key in ("datasets", "test_datasets") for entry in _list(cfg.get(key)) if hasattr(entry, "get")]
    names = [*_list(cfg.get("plugins")), *(entry.get("type") for entry in entries)]
    return cfg.get("dpo_plugin") is not None or any(str(name).startswith("dpo_plugin") for name in names)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
