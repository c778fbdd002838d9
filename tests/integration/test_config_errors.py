"""Bad input is refused with a message that says what to write, before a model is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.validation import ValidationMixin

from dpo_plugin import hookimpl, registry
from dpo_plugin.compute.loss_traits import LossTraits
from dpo_plugin.compute.losses import LOSSES
from dpo_plugin.config import DPOPluginArgs
from dpo_plugin.errors import AdapterError, ConfigError, DataError, DPOPluginError
from dpo_plugin.host.plugin import DPOPlugin, check_host_memory
from dpo_plugin.host.settings import read_settings
from dpo_plugin.model.references import ReferenceStrategy
from dpo_plugin.plan import planner as plan
from tests.support import host, tiny
from tests.support.tiny import chat_row, dpo_config, write_rows


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    from axolotl.loaders.model import ModelLoader

    monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))


def prepare(config, folder):
    from axolotl.integrations.base import PluginManager

    cfg = host.load_config(config, folder)
    return PluginManager.get_instance().load_datasets(cfg, preprocess=False)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"lora_model_dir": "./nowhere"},
            AdapterError,
            "`lora_model_dir: ./nowhere` does not exist. Write: lora_model_dir:",
        ),
        ({"adapter": "llama-adapter"}, ConfigError, "`adapter: llama-adapter`.*Write: adapter: lora"),
        ({"dpo_use_liger_kernel": True}, ConfigError, "own reference.*Write: dpo_use_liger_kernel: false"),
        (
            {"dpo_plugin": {"refrence": {}}},
            ConfigError,
            "unknown key `dpo_plugin.refrence`. Known: compute, data, health, loading, loss, metrics, pairs, reference, report, samples.*reference",
        ),
        (
            {"dpo_plugin": {"reference": {"strat": "x"}}},
            ConfigError,
            "`dpo_plugin.reference.strat`. Known: adapter_dir, cache, ema_alpha, ema_steps, strategy",
        ),
        (
            {"dpo_plugin": {"reference": {"strategy": "adaptr"}}},
            ConfigError,
            "'adaptr'.*Known: adapter, base, ema, model, none.*: adapter",
        ),
        (
            {"dpo_plugin": {"metrics": ["rewards/margin"]}},
            ConfigError,
            "'rewards/margin'.*Write: dpo_plugin.metrics: rewards/margins",
        ),
        (
            {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0]},
            ConfigError,
            r"`dpo_loss_weights` has 1 numbers for 2 losses \(sigmoid, sft\). Write: dpo_loss_weights: \[1.0, 1.0\]",
        ),
        ({"dpo_label_smoothing": 0.5}, ConfigError, "`dpo_label_smoothing: 0.5` is the share.*below 0.5. Write"),
        ({"dpo_label_smoothing": -0.1}, ConfigError, "`dpo_label_smoothing: -0.1` is the share"),
        (
            {"dpo_label_smoothing": 0.1, "dpo_loss_type": ["hinge"]},
            ConfigError,
            "is not used by hinge, only by aot, aot_unpaired, exo_pair, robust, sigmoid. Write: dpo_label_smoothing: 0",
        ),
        (
            {"dpo_ld_alpha": 0.3, "dpo_plugin": {"loss": {"ld_alpha": 0.5}}},
            ConfigError,
            "`dpo_ld_alpha: 0.3` and `dpo_plugin.loss.ld_alpha: 0.5` .*differ. Remove one. Write: dpo_ld_alpha: 0.5",
        ),
        ({"dpo_ld_alpha": 1.5}, ConfigError, "`dpo_ld_alpha` .* less than or equal to 1 .*Write: dpo_ld_alpha: 0.5"),
        ({"dpo_loss_type": ["exo_pair"]}, ConfigError, "above 0 .* exo_pair.*Write: dpo_label_smoothing: 0.001"),
        (
            {"dpo_loss_type": ["aot"], "dpo_plugin": {"compute": {"max_tokens": 512}}},
            ConfigError,
            "'aot' sees its pairs together. Remove max_tokens",
        ),
        ({"dpo_plugin": {"compute": {"max_tokens": 0}}}, ConfigError, "`dpo_plugin.compute.max_tokens`.*greater"),
        ({"dpo_plugin": {"loss": {"f_divergence": "kl"}}}, ConfigError, "`dpo_plugin.loss.f_divergence`.*reverse_kl"),
        (
            {"attn_implementation": "sdpa", "torch_compile": True, "dpo_plugin": {"compute": {"prefix_sharing": True}}},
            ConfigError,
            "`torch_compile`.*prefix_sharing: true.*Write: auto",
        ),
        (
            {"deepspeed": "deepspeed_configs/zero3_bf16.json", "fsdp_config": {"fsdp_version": 2}},
            ConfigError,
            "`deepspeed` and `fsdp_config` are both set.*Remove one",
        ),
        (
            {"fsdp_version": 1, "fsdp_config": {"use_orig_params": True}},
            ConfigError,
            "`fsdp_config` without `fsdp_version: 2` is FSDP1.*Write: fsdp_version: 2",
        ),
        (
            {
                **{"adapter": "qlora", "load_in_4bit": True, "fsdp_version": 2},
                "fsdp_config": {"cpu_ram_efficient_loading": True},
            },
            ConfigError,
            "`fsdp_config.cpu_ram_efficient_loading: true`.*Write: cpu_ram_efficient_loading: false",
        ),
        (
            {"adapter": "qlora", "load_in_4bit": True, "dpo_plugin": {"loading": "sharded"}},
            ConfigError,
            "`dpo_plugin.loading: sharded` is asked for, but DDP keeps the whole base on each GPU. Write: loading: host",
        ),
        (
            {"dpo_plugin": {"loading": "slices"}},
            ConfigError,
            "dpo_plugin.loading.*'sharded' or 'host'",
        ),
        (
            {"adapter": None, "fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}},
            ConfigError,
            "`adapter: None`.*Write: cpu_ram_efficient_loading: false",
        ),
        (
            {
                "deepspeed": "deepspeed_configs/zero3_bf16.json",
                "dpo_plugin": {"compute": {"master_weights": False}},
            },
            ConfigError,
            "`dpo_plugin.compute.master_weights: false` cannot be had under ZeRO-3.*Write: master_weights: true",
        ),
        ({"deepspeed": "zero9.json"}, ConfigError, "`deepspeed: zero9.json` does not exist. `axolotl dpo recipes"),
        ({"deepspeed": "pyproject.toml"}, ConfigError, "`deepspeed: pyproject.toml` is not valid JSON"),
        (
            {"deepspeed": "deepspeed_configs/zero3_bf16.json", "load_in_8bit": True},
            ConfigError,
            "`load_in_8bit: true` cannot be partitioned by ZeRO-3.*Write: load_in_4bit: true",
        ),
        (
            {"deepspeed": {"train_micro_batch_size_per_gpu": 3}},
            ConfigError,
            '`train_micro_batch_size_per_gpu: 3`.*config, which says 4. Write there: "train_micro_batch_size_per_gpu": "auto"',
        ),
        ({"deepspeed": {"train_batch_size": 5}}, ConfigError, "`train_batch_size: 5`.*which says 4"),
        (
            {"dpo_plugin": {"health": {"checks": {"loss_at_ln": "stop"}}}},
            ConfigError,
            "`dpo_plugin.health.checks` names the health check 'loss_at_ln'.*Write: dpo_plugin.health.checks: loss_at_ln2",
        ),
        ({"dpo_plugin": {"health": {"action": "panic"}}}, ConfigError, "`dpo_plugin.health.action`.*'warn', 'stop'"),
        ({"dpo_plugin": {"metrics": "all"}}, ConfigError, "`dpo_plugin.metrics`.*list"),
        (
            {"dpo_plugin": {"reference": {"strategy": "adapter"}}},
            ConfigError,
            "finds no adapter. Write: lora_model_dir",
        ),
        ({"dpo_loss_type": ["sigmoyd"]}, ConfigError, "'sigmoyd'.*Write: dpo_loss_type: sigmoid"),
        ({"peft_init_lora_weights": "pissa"}, ConfigError, "`peft_init_lora_weights` .* pissa, .*reference"),
        (
            {"peft": {"loftq_config": {"loftq_bits": 4}}},
            ConfigError,
            "`peft.loftq_config` .*Write: peft.loftq_config: null",
        ),
        (
            {"context_parallel_size": 2},
            ConfigError,
            "`context_parallel_size: 2` splits rows.*Write: context_parallel_size: 1",
        ),
        ({"sequence_parallel_degree": 4}, ConfigError, "`sequence_parallel_degree: 4` .*: 1"),
        (
            {"tensor_parallel_size": 2, "deepspeed": "deepspeed_configs/zero3_bf16.json"},
            ConfigError,
            "`tensor_parallel_size: 2` splits.*Write: tensor_parallel_size: 1",
        ),
        ({"rl_beta": 0}, ConfigError, "`rl_beta: 0` must be above 0"),
        ({"trainer_cls": "other.Trainer"}, ConfigError, "`trainer_cls: other.Trainer`"),
    ],
)
def test_a_bad_config(base_dir, tmp_path, change, error, says):
    with pytest.raises(error, match=says):
        host.load_config(dpo_config(base_dir, tmp_path / "out", **change), tmp_path)


DIVERGENT = ("discopop", "exo_pair", "hinge", "ipo", "robust", "sft", "sigmoid", "sigmoid_norm")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_without_meaning_for_a_loss(base_dir, tmp_path, name, divergence):
    """Alone and beside a loss that takes it; α = 1 is the reverse KL."""
    smoothing = {"dpo_label_smoothing": 0.1} if name == "exo_pair" else {}

    def read(alpha=0.5):
        loss = {"f_divergence": divergence, "f_alpha": alpha}
        names = [name] if name == "sigmoid" else ["sigmoid", name]
        config = dpo_config(base_dir, tmp_path / "out", dpo_loss_type=names, dpo_plugin={"loss": loss}, **smoothing)
        return read_settings(config)

    if name in DIVERGENT or divergence == "reverse_kl":
        assert read().config.loss.f_divergence == divergence
        return
    with pytest.raises(
        ConfigError, match=rf"`dpo_plugin.loss.f_divergence: {divergence}` .* loss {name}, .*sigmoid_norm"
    ):
        read()
    if divergence == "alpha_divergence":
        read(alpha=1)


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        ({"deepspeed": "deepspeed_configs/zero3_bf16_offload.json"}, "deepspeed"),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True}}, "fsdp_config.offload_params"),
    ],
)
def test_offload_to_a_host_without_memory(engine, key, base_dir, sft_dir, tmp_path, monkeypatch):
    config = dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), bf16=True, **engine)
    monkeypatch.setattr(plan, "memory_here", lambda: plan.GIB)
    settings = read_settings(config)
    with pytest.raises(ConfigError, match=rf"`{key}` moves what it can to the host, which takes 2\.\d+ GiB.* has 1"):
        check_host_memory(config, settings)
    with pytest.raises(ConfigError, match=f"`{key}` moves"):
        host.load_config(config, tmp_path)
    monkeypatch.setattr(plan, "memory_here", lambda: 8 * plan.GIB)
    check_host_memory(config, settings)


def test_a_model_that_cannot_be_planned_is_not_refused_for_it(base_dir, sft_dir, tmp_path, monkeypatch):
    def fails(*_):
        raise ConfigError("no plan. Write: nothing")

    offload = {"deepspeed": "deepspeed_configs/zero3_bf16_offload.json"}
    monkeypatch.setattr(plan.Planner, "need", fails)
    config = dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), **offload)
    check_host_memory(config, read_settings(config))


def test_an_adapter_folder_without_config(base_dir, sft_dir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AdapterError, match="holds no adapter_config.json"):
        host.load_config(dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(empty)), tmp_path)


def test_another_rank_than_the_adapters(base_dir, sft_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"`lora_r: 16` differs.*Write: lora_r: 8"):
        host.load_config(dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), lora_r=16), tmp_path)


def test_an_unknown_format_lists_the_known(base_dir, tmp_path):
    data = [{"path": str(tiny.ROOT / "recipes/data/preferences.jsonl"), "ds_type": "json", "type": "dpo_plugin.chatt"}]
    with pytest.raises(
        ConfigError, match=r"`datasets\[0\].type: dpo_plugin` names the preference format 'chatt'.*chat"
    ):
        host.load_config(dpo_config(base_dir, tmp_path / "out", datasets=data), tmp_path)


class TestData:
    def run(self, base_dir, tmp_path, path):
        data = [{"path": str(path), "ds_type": "json", "type": "dpo_plugin.chat"}]
        return prepare(dpo_config(base_dir, tmp_path / "out", datasets=data), tmp_path)

    def test_a_missing_file(self, base_dir, tmp_path):
        with pytest.raises(DataError, match=r"`datasets\[0\].path: .*gone.jsonl` does not exist"):
            self.run(base_dir, tmp_path, tmp_path / "gone.jsonl")

    def test_an_empty_file(self, base_dir, tmp_path):
        with pytest.raises(DataError, match=r"empty.jsonl` is empty"):
            self.run(base_dir, tmp_path, write_rows(tmp_path / "empty.jsonl", []))

    def test_no_usable_column(self, base_dir, tmp_path):
        rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
        with pytest.raises(DataError, match=r"no usable row.*row 1: `chosen` is missing"):
            self.run(base_dir, tmp_path, rows)

    def test_good_rows_become_ids(self, base_dir, tmp_path, tokenizer):
        rows = write_rows(tmp_path / "rows.jsonl", [chat_row("q", "a", "b", "one"), chat_row("q", "c", "d", "two")])
        data = self.run(base_dir, tmp_path, rows).train_dataset
        assert set(data["source"]) == {"one", "two"}
        assert {tokenizer.decode(ids) for ids in data["chosen_ids"]} == {"a<|im_end|>", "c<|im_end|>"}


@pytest.fixture
def register(monkeypatch):
    """Lets a third party's package bring what a hook returns."""

    def register(hook, things):
        def implementation():
            return things

        implementation.__name__ = hook
        manager = registry.build_manager()
        manager.register(SimpleNamespace(**{hook: hookimpl(implementation)}), name="their-package")
        monkeypatch.setattr("dpo_plugin.host.settings.get_registry", lambda: registry.build_registry(manager))

    return register


class Drifting(ReferenceStrategy):
    """A third party's reference on the policy's own base, which moves."""

    moves = True
    needs_lora = True

    def run(self, model, batch, forward):
        return forward(model, batch)


def test_fsdp_config_without_a_version_is_what_the_host_takes_it_for(base_dir, tmp_path):
    """axolotl took it for FSDP1 up to 0.19, and takes it for FSDP2."""
    unversioned = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    taken = {**unversioned, "fsdp_config": dict(unversioned["fsdp_config"])}
    assert ValidationMixin.check_fsdp_version_in_fsdp_config(taken)["fsdp_version"] in (1, 2)
    config = dpo_config(base_dir, tmp_path / "out", **unversioned)
    if taken["fsdp_version"] == 1:
        with pytest.raises(ConfigError, match="without `fsdp_version: 2` is FSDP1.*Write: fsdp_version: 2"):
            host.load_config(config, tmp_path)
        return
    assert host.load_config(config, tmp_path).fsdp_version == 2
    assert DPOPlugin.active().run_settings().engine.name == "fsdp2"


class TestWhatAThirdPartyDeclares:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                {"deepspeed": "deepspeed_configs/zero3_bf16.json"},
                r"strategy: drifting` moves .* under ZeRO-3\. Write: strategy: adapter",
            ),
            (
                {"fsdp_config": {"fsdp_version": 2}},
                r"strategy: drifting` moves .* under FSDP\. Write: strategy: adapter",
            ),
            ({"adapter": None}, "strategy: drifting` needs an adapter. Write: adapter: lora"),
            (
                {"dpo_plugin": {"reference": {"strategy": "drifting", "cache": True}}},
                "drifting` .* Write: cache: false",
            ),
        ],
    )
    def test_a_moving_reference_is_refused_where_ours_is(self, base_dir, tmp_path, register, change, says):
        register("dpo_reference_strategies", {"drifting": Drifting})
        section = {"dpo_plugin": {"reference": {"strategy": "drifting"}}}
        assert read_settings(dpo_config(base_dir, tmp_path / "out", **section)).reference.cache_dir is None
        with pytest.raises(ConfigError, match=says):
            read_settings(dpo_config(base_dir, tmp_path / "out", **{**section, **change}))

    def read(self, base_dir, tmp_path, **change):
        limit = {"dpo_plugin": {"compute": {"max_tokens": 512}}}
        return read_settings(dpo_config(base_dir, tmp_path / "out", dpo_loss_type=["theirs"], **{**limit, **change}))

    @pytest.mark.parametrize(
        ("traits", "says"),
        [
            (LossTraits(couples_pairs=True), "'theirs' sees its pairs together. Remove max_tokens"),
            (None, r"'theirs' does not declare that .*@LossTraits\(\).*Write: max_tokens: null"),
        ],
    )
    def test_a_loss_that_may_see_pairs_together_is_not_split(self, base_dir, tmp_path, register, traits, says):
        def theirs(logps, options):
            return logps.chosen_logratios - logps.chosen_logratios.mean()

        register("dpo_losses", {"theirs": traits(theirs) if traits else theirs})
        with pytest.raises(ConfigError, match=says):
            self.read(base_dir, tmp_path)
        assert self.read(base_dir, tmp_path, dpo_plugin=None).config.compute.max_tokens is None

    def test_a_loss_that_sees_each_pair_alone_is_split_and_takes_no_option_that_it_does_not_name(
        self, base_dir, tmp_path, register
    ):
        @LossTraits()
        def theirs(logps, options):
            return -logps.chosen_logratios

        register("dpo_losses", {"theirs": theirs})
        assert self.read(base_dir, tmp_path).config.compute.max_tokens == 512
        with pytest.raises(ConfigError, match="is not used by theirs, only by aot, .*, sigmoid. Write"):
            self.read(base_dir, tmp_path, dpo_label_smoothing=0.1)
        with pytest.raises(ConfigError, match="has no meaning for the loss theirs"):
            self.read(base_dir, tmp_path, dpo_plugin={"loss": {"f_divergence": "forward_kl"}})

    def test_a_plain_function_takes_every_option(self, base_dir, tmp_path, register):
        register("dpo_losses", {"theirs": lambda logps, options: -logps.chosen_logratios})
        section = {"loss": {"f_divergence": "forward_kl"}}
        assert self.read(base_dir, tmp_path, dpo_label_smoothing=0.1, dpo_plugin=section)


def test_two_plugins_with_one_name(base_dir, tmp_path, register):
    register("dpo_preference_formats", {"chat": print})
    with pytest.raises(
        DPOPluginError, match="'chat' is registered twice.*their-package.*builtins|builtins.*their-package"
    ):
        host.load_config(dpo_config(base_dir, tmp_path / "out"), tmp_path)


def test_an_sft_config_is_left_alone(base_dir, tmp_path, capfd):
    config = dpo_config(base_dir, tmp_path / "out", rl=None, rl_beta=None)
    config["datasets"] = [
        {"path": str(tiny.ROOT / "recipes/data/sft.jsonl"), "ds_type": "json", "type": "chat_template"}
    ]
    cfg = host.load_config(config, tmp_path)
    assert cfg.trainer_cls is None
    assert json.loads(json.dumps(cfg.plugins)) == ["dpo_plugin.DPOPlugin"]


@pytest.mark.parametrize("offload", [False, True])
def test_every_setting_is_read_once(offload, base_dir, sft_dir, tmp_path, monkeypatch):
    """The DeepSpeed JSON is opened once and the section parsed once, also where the run's memory is planned."""
    engine = tmp_path / "zero3.json"
    name = "zero3_bf16_offload" if offload else "zero3_bf16"
    engine.write_text((tiny.ROOT / f"deepspeed_configs/{name}.json").read_text(encoding="utf-8"), encoding="utf-8")
    opened, parsed = [], []
    read_text, parse = Path.read_text, DPOPluginArgs.__init__

    def counted(self, *args, **kwargs):
        opened.append(self)
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    monkeypatch.setattr(DPOPluginArgs, "__init__", lambda self, **keys: (parsed.append(keys), parse(self, **keys))[1])
    config = dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), bf16=True, deepspeed=str(engine))
    DPOPlugin().register(DictDefault(config))
    assert opened.count(engine) == 1
    assert len(parsed) == 1
