"""`RunSettings`: what the raw YAML says, read once and checked as far as the config alone can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_plugin.compute.loss_traits import check_divergence, check_smoothing, check_split
from dpo_plugin.config import Action, DPOPluginConfig, ReferenceConfig, parse_config
from dpo_plugin.engines.config import EngineSettings, check_parallel
from dpo_plugin.engines.loading import Loading
from dpo_plugin.engines.master_weights import check_master_weights
from dpo_plugin.errors import ConfigError, DataError
from dpo_plugin.health.monitor import HealthCheck
from dpo_plugin.host.templates import check_samples
from dpo_plugin.host.yaml_keys import DATA_SUFFIXES, check_names
from dpo_plugin.metrics.pair import TRL_METRICS, PreferenceMetric
from dpo_plugin.model.adapter_config import AdapterFolder, check_equal_parameters, check_fresh_init, open_adapter
from dpo_plugin.model.references import ReferenceChoice, ReferenceStrategy, strategy_name
from dpo_plugin.model.target_parameters import check_fresh_parameters
from dpo_plugin.registry import Registry, get_registry

PREFIX = "dpo_plugin."

_NUMERICS = (
    "load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "nf4_backend", "bf16", "bfloat16", "fp16", "float16", "tf32",
    "quantize_moe_experts",
)  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """The settings of one run.

    Attributes:
        config: The ``dpo_plugin:`` section.
        policy: The adapter that the policy starts from, or None for a fresh LoRA or full fine-tuning.
        reference: Where the reference's log-probs come from.
        engine: How the run is spread over processes, and its precision.
        loading: Whether a 4-bit base is loaded in parts, and if not, why.
        revision: Revision of the base model on the hub, if the YAML names one.
        numerics: Keys of the YAML that decide how the base is quantised and computes, for the cache's key.
        template: ``chat_template``, ``chat_template_jinja`` and ``chat_template_kwargs``.
        metrics: Metrics to log.
        health_checks: Health checks to run, and what happens when one finds something.
        precompute: Whether reference log-probs are computed before the first step.
        prefix_sharing_blocker: Why the config alone keeps prefixes from being shared, or None.
        resume_named: Whether the YAML names the checkpoint to resume from.
        datasets: The ``datasets`` entries as written; the host's schema drops keys that it does not know.
        test_datasets: The same of ``test_datasets``.
    """

    config: DPOPluginConfig
    policy: AdapterFolder | None
    reference: ReferenceChoice
    engine: EngineSettings
    loading: Loading
    revision: str | None
    numerics: Mapping[str, Any]
    template: Mapping[str, Any]
    metrics: Mapping[str, PreferenceMetric]
    health_checks: Mapping[str, tuple[HealthCheck, Action]]
    precompute: bool
    prefix_sharing_blocker: str | None
    resume_named: bool
    datasets: list[dict[str, Any]]
    test_datasets: list[dict[str, Any]]


def read_settings(cfg: Mapping[str, Any]) -> RunSettings:
    """Read and check a config with ``rl: dpo`` or ``rl: ipo``.

    Args:
        cfg: What `dpo_plugin.host.yaml_keys.typed` made of the raw YAML.

    Raises:
        ConfigError: For a key, name or combination that cannot be served.
        AdapterError: If an adapter folder is missing or unusable.
        DataError: If a data file is missing or empty.
    """
    registry = get_registry()
    config = _section(cfg)
    check_names(cfg)
    _check_host_keys(cfg)
    engine = EngineSettings.read(cfg)
    check_parallel(cfg, engine)
    check_master_weights(config.compute.master_weights, engine)
    check_samples(config, engine, held_out=bool(cfg.get("test_datasets") or cfg.get("val_set_size")))
    _check_losses(cfg, config, registry)
    policy, jinja = _policy_folder(cfg), cfg.get("chat_template_jinja")  # needs no name, as in the host's validator
    own = {} if cfg.get("adapter") else {"master_weights": config.compute.master_weights}
    return RunSettings(
        config=config,
        policy=policy,
        reference=_reference(cfg, config.reference, policy, engine, registry),
        engine=engine,
        loading=Loading.choose(config.loading, cfg, engine),
        revision=cfg.get("revision_of_model"),
        numerics={key: cfg[key] for key in _NUMERICS if cfg.get(key)} | own,
        template={
            "chat_template": cfg.get("chat_template") or ("jinja" if jinja else None),
            "chat_template_jinja": jinja,
            "chat_template_kwargs": cfg.get("chat_template_kwargs"),
        },
        metrics=_metrics(config, registry),
        health_checks=_health_checks(config, registry),
        precompute=bool(cfg.get("precompute_ref_log_probs")),
        prefix_sharing_blocker=_prefix_sharing_blocker(cfg, config),
        resume_named=bool(cfg.get("resume_from_checkpoint")),
        datasets=_entries(cfg, "datasets", registry),
        test_datasets=_entries(cfg, "test_datasets", registry),
    )


def _section(cfg: Mapping[str, Any]) -> DPOPluginConfig:
    """The ``dpo_plugin:`` section, with ``dpo_ld_alpha``, axolotl's own key since 0.21, in its ``loss``."""
    config, alpha = parse_config(cfg.get("dpo_plugin")), cfg.get("dpo_ld_alpha")
    if alpha is None:
        return config
    own = config.loss.ld_alpha
    if own not in (None, alpha):
        raise ConfigError(
            f"`dpo_ld_alpha: {alpha:g}` and `dpo_plugin.loss.ld_alpha: {own:g}` both weight the tokens beyond the "
            f"shorter answer, and differ. Remove one. Write: dpo_ld_alpha: {own:g}"
        )
    return config.model_copy(update={"loss": config.loss.model_copy(update={"ld_alpha": alpha})})


def _check_host_keys(cfg: Mapping[str, Any]) -> None:
    if cfg.get("dpo_use_liger_kernel"):
        raise ConfigError(
            "`dpo_use_liger_kernel: true` computes its own reference and would bypass the reference adapter. "
            "Write: dpo_use_liger_kernel: false"
        )
    for key in ("processor_type", "is_multimodal"):
        if cfg.get(key):
            raise ConfigError(
                f"`{key}: {cfg[key]}` is for images, and dpo_plugin trains on text alone, also a model that sees. "
                f"Write: {key}: null"
            )
    for key in ("micro_batch_size", "gradient_accumulation_steps"):
        if key in cfg and not cfg[key] and not cfg.get("batch_size"):
            raise ConfigError(f"`{key}` is empty, and there is no batch_size to compute it from. Write: {key}: 1")
    beta = cfg.get("rl_beta")
    if beta is not None and not beta > 0:
        raise ConfigError(f"`rl_beta: {beta:g}` must be above 0. Write: rl_beta: 0.1")


def _check_losses(cfg: Mapping[str, Any], config: DPOPluginConfig, registry: Registry) -> None:
    names = cfg.get("dpo_loss_type") or ["ipo" if cfg.get("rl") == "ipo" else "sigmoid"]
    losses = {name: registry.losses.find(name, "dpo_loss_type") for name in names}
    weights = cfg.get("dpo_loss_weights")
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"`dpo_loss_weights` has {len(weights)} numbers for {len(names)} losses ({', '.join(names)}). "
            f"Write: dpo_loss_weights: {[1.0] * len(names)}"
        )
    check_smoothing(cfg.get("dpo_label_smoothing"), losses, registry.losses)
    check_divergence(config.loss, losses, registry.losses)
    if config.compute.max_tokens is not None:
        check_split(losses)


def _policy_folder(cfg: Mapping[str, Any]) -> AdapterFolder | None:
    path = cfg.get("lora_model_dir")
    if not path:
        peft = cfg.get("peft")
        loftq = isinstance(peft, Mapping) and peft.get("loftq_config")
        check_fresh_init("loftq" if loftq else cfg.get("peft_init_lora_weights"))
        check_fresh_parameters(cfg)
        return None
    if not cfg.get("adapter"):
        raise ConfigError("`lora_model_dir` is set but `adapter` is not. Write: adapter: lora (or qlora)")
    folder = open_adapter(path, "lora_model_dir")
    for key, saved in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        asked, found = cfg.get(key), folder.config.get(saved)
        if asked is not None and found is not None and asked != found:
            raise ConfigError(
                f"`{key}: {asked}` differs from the adapter in `lora_model_dir: {path}`, which has {found}; "
                f"the policy starts from that adapter and keeps its shape. Write: {key}: {found}"
            )
    return folder


def _reference(
    cfg: Mapping[str, Any],
    config: ReferenceConfig,
    policy: AdapterFolder | None,
    engine: EngineSettings,
    registry: Registry,
) -> ReferenceChoice:
    name = strategy_name(cfg, config)
    strategy = registry.reference_strategies.find(name, "dpo_plugin.reference.strategy")
    if config.adapter_dir and not strategy.needs_adapter:
        raise ConfigError(
            f"`dpo_plugin.reference.adapter_dir` is set but the strategy is {name!r}, which does not use it. "
            "Write: strategy: adapter"
        )
    if strategy.needs_second_model and cfg.get("adapter"):
        raise ConfigError(
            f"`dpo_plugin.reference.strategy: {name}` loads a second model, which the host does for full fine-tuning "
            "only. Write: strategy: adapter"
        )
    if (strategy.needs_lora or strategy.needs_adapter) and not cfg.get("adapter"):
        raise ConfigError(f"`dpo_plugin.reference.strategy: {name}` needs an adapter. Write: adapter: lora")
    adapter = None
    if strategy.needs_adapter:
        own = config.adapter_dir
        adapter = open_adapter(own, "dpo_plugin.reference.adapter_dir") if own else policy
        if adapter is None:
            raise ConfigError(
                f"`dpo_plugin.reference.strategy: {name}` finds no adapter. Write: lora_model_dir: <SFT adapter folder>"
            )
        check_equal_parameters(policy, cfg.get("lora_target_parameters"), adapter)
    strategy.check_adapters(policy, adapter)
    if engine.shards_parameters and strategy.moves:
        raise ConfigError(
            f"`dpo_plugin.reference.strategy: {name}` moves the reference's tensors, of which a rank holds a part "
            f"under {engine.label}. Write: strategy: adapter (or deepspeed: <a config of ZeRO stage 1 or 2>)"
        )
    return ReferenceChoice(name, strategy, adapter, _cache_dir(cfg, config.cache, strategy, name))


def _cache_dir(
    cfg: Mapping[str, Any], cache: bool | str | None, strategy: type[ReferenceStrategy], name: str
) -> Path | None:
    if cache and not strategy.cacheable():
        raise ConfigError(
            f"`dpo_plugin.reference.strategy: {name}` has no log-probs that could be cached, but `cache: {cache}` asks "
            "for it. Write: cache: false"
        )
    if cache is False or not strategy.cacheable():
        return None
    return Path(cache) if isinstance(cache, str) else Path(cfg.get("dataset_prepared_path") or "last_run_prepared")


_ATTENTION_FLAGS = (
    "flash_attention", "flex_attention", "s2_attention", "sage_attention", "sdp_attention", "xformers_attention",
)  # fmt: skip
"""axolotl's keys from before attn_implementation, which its schema still takes, but for eager_attention."""


def _prefix_sharing_blocker(cfg: Mapping[str, Any], config: DPOPluginConfig) -> str | None:
    """Why chosen and rejected are computed as two rows each, or None if they share their prefix."""
    wanted = config.compute.prefix_sharing
    if wanted is False:
        return "`dpo_plugin.compute.prefix_sharing: false` asks for it"
    if cfg.get("torch_compile"):
        why = "`torch_compile` would compile anew for each pair's lengths"
        if wanted is True:
            raise ConfigError(f"{why}, but `dpo_plugin.compute.prefix_sharing: true` needs one flat row. Write: auto")
        return why
    asked = cfg.get("attn_implementation")
    named = [f"attn_implementation: {asked}"] if asked and asked != "eager" else []
    named += [f"{flag}: true" for flag in _ATTENTION_FLAGS if cfg.get(flag)]
    if named and wanted == "auto":
        return f"`{named[0]}` asks for an attention by name; remove the line to share prefixes"
    return None


def _metrics(config: DPOPluginConfig, registry: Registry) -> Mapping[str, PreferenceMetric]:
    extra = registry.metrics if config.metrics is None else config.metrics
    chosen = {name: registry.metrics.find(name, "dpo_plugin.metrics") for name in extra}
    return {**TRL_METRICS, **chosen}


def _health_checks(config: DPOPluginConfig, registry: Registry) -> Mapping[str, tuple[HealthCheck, Action]]:
    for name in config.health.checks:
        registry.health_checks.find(name, "dpo_plugin.health.checks")
    actions = {name: config.health.checks.get(name, config.health.action) for name in registry.health_checks}
    return {name: (registry.health_checks[name], action) for name, action in actions.items() if action != "off"}


def _entries(cfg: Mapping[str, Any], key: str, registry: Registry) -> list[dict[str, Any]]:
    entries = cfg.get(key) or []
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        kind = entry.get("type")
        if isinstance(kind, str) and kind.startswith(PREFIX):
            registry.formats.find(kind.removeprefix(PREFIX), f"{where}.type: dpo_plugin")
        _check_files(entry, where)
    return entries


def _check_files(entry: Mapping[str, Any], where: str) -> None:
    files = entry.get("data_files") or []
    named = [("data_files", file) for file in ([files] if isinstance(files, str) else files)]
    path = entry["path"]
    if Path(path).suffix in DATA_SUFFIXES:
        named.append(("path", path))
    for key, file in named:
        if "://" in file or any(sign in file for sign in "*?["):
            continue
        if not Path(file).is_file():
            if key == "path" or not Path(path).is_dir():
                raise DataError(f"`{where}.{key}: {file}` does not exist. Write: {key}: <an existing file>")
        elif Path(file).stat().st_size == 0:
            raise DataError(f"`{where}.{key}: {file}` is empty. Write: {key}: <a file with rows>")
