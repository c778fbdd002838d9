"""Prompts, answers of policy and reference, their rewards, and what is kept, with plain PEFT as oracle."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_plugin.compute import attention
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import attach
from dpo_plugin.model.references import ReferenceStrategy
from dpo_plugin.registry import get_registry
from dpo_plugin.samples import generate as answers
from dpo_plugin.samples.generate import AnswerOptions, Sampler, generate
from dpo_plugin.samples.prompts import prompts_of_pairs, read_prompts, user_turn
from dpo_plugin.samples.records import Answer, Sample, append_samples, keep_until, samples_markdown, samples_table
from tests.support import templates, tiny

PROMPTS = [[9, 8, 7], [11, 12, 13, 14, 15, 16, 17, 18], [30], [40, 41, 42, 43]]
STOP = 2
OPTIONS = AnswerOptions(max_new_tokens=12, stop_ids=(STOP,), pad_token_id=0)


@pytest.fixture(scope="module")
def dpo_dir(base_dir, tmp_path_factory):
    return tiny.save_adapter(base_dir, tmp_path_factory.mktemp("dpo"), seed=7)


@pytest.fixture
def model(base_dir, sft_dir, dpo_dir):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    return attach(base, AdapterFolder.open(dpo_dir, "a"), AdapterFolder.open(sft_dir, "b"))


@pytest.fixture
def oracles(base_dir, sft_dir, dpo_dir):
    """Base, reference and policy as three models of their own."""
    load = AutoModelForCausalLM.from_pretrained
    adapters = [PeftModel.from_pretrained(load(base_dir), str(folder)).eval() for folder in (sft_dir, dpo_dir)]
    return load(base_dir).eval(), *adapters


def greedy(model, prompt, count, stop=STOP):
    """The likeliest token each time, from a whole forward without padding or cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == stop:
                break
    return ids[len(prompt) :]


def logp(model, prompt, answer):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), answer].sum())


def sampler(model, tokenizer, strategy="adapter", **settings):
    made = strategy if isinstance(strategy, ReferenceStrategy) else get_registry().reference_strategies[strategy](model)
    return Sampler(made, tokenizer, OPTIONS, beta=0.3, **settings)


class TestAnswers:
    @pytest.mark.parametrize("at_once", [1, 3, 8])
    def test_each_adapter_answers_as_it_does_alone(self, model, oracles, at_once):
        options = replace(OPTIONS, at_once=at_once)
        base, reference, policy = oracles
        model.eval()
        inner = model.get_base_model()
        expected = [[greedy(one, prompt, 12) for prompt in PROMPTS] for one in (policy, reference, base)]
        assert generate(inner, PROMPTS, options) == expected[0]
        with model.reference_active():
            assert generate(inner, PROMPTS, options) == expected[1]
        with model.adapters_off():
            assert generate(inner, PROMPTS, options) == expected[2]
        assert generate(inner, PROMPTS, OPTIONS) == expected[0]
        assert expected[0] != expected[1] != expected[2]

    def test_an_answer_ends_with_the_first_stop_id(self, model):
        inner = model.eval().get_base_model()
        whole = generate(inner, PROMPTS, OPTIONS)
        stop = whole[1][3]
        cut = generate(inner, PROMPTS, AnswerOptions(12, (stop, STOP), 0))
        for short, long in zip(cut, whole, strict=True):
            end = long.index(stop) + 1 if stop in long else len(long)
            assert short == long[:end]
        assert len(cut[1]) < len(whole[1])

    def test_the_models_own_generation_settings_are_neither_used_nor_lost(self, model):
        inner = model.eval().get_base_model()
        plain = generate(inner, PROMPTS, OPTIONS)
        inner.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=50.0, min_new_tokens=2)
        before = inner.generation_config.to_dict()
        assert generate(inner, PROMPTS, OPTIONS) == plain
        assert inner.generation_config.to_dict() == before

    @pytest.mark.parametrize("temperature", [0.0, 1.5])
    def test_the_runs_random_numbers_stay_as_they_are(self, model, temperature):
        inner = model.eval().get_base_model()
        torch.manual_seed(3)
        before = torch.get_rng_state()
        options = AnswerOptions(12, (STOP,), 0, temperature=temperature, seed=5)
        first = generate(inner, PROMPTS, options)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(4)
        assert generate(inner, PROMPTS, options) == first
        assert (first == generate(inner, PROMPTS, OPTIONS)) == (temperature == 0)

    def test_mode_and_checkpointing_are_put_back_and_the_cache_is_used(self, model, tokenizer, monkeypatch):
        base = model.get_base_model()
        base.gradient_checkpointing_enable()
        model.train()
        layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        before = [module.gradient_checkpointing for module in layers]
        assert any(before)
        lengths = []
        base.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        sampler(model, tokenizer)(model, PROMPTS)
        assert lengths[:4] == [8, 1, 1, 1]
        assert all(module.training for module in model.modules())
        assert [module.gradient_checkpointing for module in layers] == before
        monkeypatch.setattr(answers, "generate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sampler(model, tokenizer)(model, PROMPTS)
        assert model.training


class TestSampler:
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("strategy", ["adapter", "base", "none"])
    def test_rewards_are_beta_times_the_log_ratio_of_the_answer(self, model, oracles, tokenizer, strategy, flat):
        if flat:
            attention.attend_to_pairs(model.get_base_model())
        base, reference, policy = oracles
        other = {"adapter": reference, "base": base, "none": None}[strategy]
        found = sampler(model, tokenizer, strategy, flat=flat)(model, PROMPTS, step=3)
        for prompt, sample in zip(PROMPTS, found, strict=True):
            for answer, one in ((sample.policy, policy), (sample.reference, other)):
                if one is None:
                    assert answer is None
                    continue
                ids = greedy(one, prompt, 12)
                ratio = logp(policy, prompt, ids) - (0 if other is None else logp(other, prompt, ids))
                assert answer.reward == pytest.approx(0.3 * ratio, abs=2e-4)
                assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
                assert (answer.tokens, answer.ended) == (len(ids), ids[-1] == STOP)
            assert (sample.step, sample.prompt) == (3, tokenizer.decode(prompt))

    def test_a_second_model_answers_itself(self, model, oracles, tokenizer):
        base, _, policy = oracles
        strategy = get_registry().reference_strategies["model"](policy, ref_model=base)
        (sample,) = sampler(policy, tokenizer, strategy)(policy, PROMPTS[:1])
        assert sample.reference.text == tokenizer.decode(greedy(base, PROMPTS[0], 12), skip_special_tokens=True).strip()

    def test_where_policy_is_reference_answers_are_equal_and_rewards_0(self, base_dir, sft_dir, tokenizer):
        folder = AdapterFolder.open(sft_dir, "a")
        model = attach(AutoModelForCausalLM.from_pretrained(base_dir), folder, folder)
        for sample in sampler(model, tokenizer)(model, PROMPTS):
            assert sample.policy == sample.reference
            assert sample.policy.reward == 0

    def test_a_third_partys_strategy_that_only_scores_leaves_the_reference_out(self, model, tokenizer):
        class Scores(ReferenceStrategy):
            def run(self, model, batch, forward):
                with self.policy.adapters_off():
                    return forward(model, batch)

        found = sampler(model, tokenizer, Scores(model))(model, PROMPTS)
        assert all(sample.reference is None and sample.policy.reward != 0 for sample in found)
        assert "no model that answers" in shown(found)


def shown(found):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(samples_table(found, "t"))
    return capture.get()


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "text", "prompts"),
        [
            ("p.txt", "One?\n\n  Two [b]?  \n", ["One?", "Two [b]?"]),
            ("p.jsonl", '{"prompt": "One?"}\n{"messages": [{"role": "user", "content": "Two?"}]}\n',
             ["One?", [{"role": "user", "content": "Two?"}]]),
            ("p.txt", '\ufeff{"prompt": "a\u2028b"}', ["a\u2028b"]),
        ],
    )  # fmt: skip
    def test_files(self, tmp_path, name, text, prompts):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [prompt.content for prompt in read_prompts(tmp_path / name, "x.prompts")] == prompts

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (b"", "`x.prompts: .*p.jsonl` is empty. Write: prompts: <"),
            (b"\xff\xfe", "is not UTF-8 text"),
            (b'{"prompt": "a"}\nno', 'line 2 is not JSON.*Write: {"prompt"'),
            (b'{"prompt": ' + b"[" * 100_000, 'line 1 is not JSON.*Write: {"prompt"'),
            (b'{"prompt": "\\ud83d"}', 'line 1 is not JSON.*surrogates.*Write: {"prompt"'),
            (b'{"question": "a"}', "line 1 has neither.*it has question. Write"),
            (b'{"prompt": " "}', "line 1 has neither"),
            (b'{"prompt": "a", "messages": []}', "line 1 has neither"),
            (b"[1]", "line 1 has neither.*it has list"),
            (b'{"messages": [{"role": "user"}]}', "line 1 has a message without a role"),
            (b'{"messages": [{"role": "human", "content": "a"}]}', "line 1 has a message without a role"),
            (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 1 ends with the assistant's answer"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_line(self, tmp_path, text, says):
        (tmp_path / "p.jsonl").write_bytes(text)
        with pytest.raises(ConfigError, match=says):
            read_prompts(tmp_path / "p.jsonl", "x.prompts")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"`x.prompts: .*none.txt` does not exist. Write: prompts: <an existing"):
            read_prompts(tmp_path / "none.txt", "x.prompts")

    def test_of_pairs_are_different_and_not_empty(self):
        rows = [{"prompt_ids": ids} for ids in ([1, 2], [1, 2], [], [3], [4])]
        assert prompts_of_pairs(rows, 2) == [[1, 2], [3]]
        assert prompts_of_pairs(rows, 9) == [[1, 2], [3], [4]]


class TestKept:
    SAMPLE = Sample(2, "a|b\nc", Answer("[red]yes", 3, True, 0.5), Answer("no", 9, False, -0.25))

    def test_a_resumed_run_writes_each_step_once(self, tmp_path):
        file = tmp_path / "out" / "samples.jsonl"
        keep_until(file, 0)
        for step in (2, 4, 6):
            append_samples(file, [Sample(step, "p", self.SAMPLE.policy, None)])
        with file.open("a") as handle:
            handle.write('{"step": 8, "pro')
        keep_until(file, 4)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4]
        policy = {"text": "[red]yes", "tokens": 3, "ended": True, "reward": 0.5, "score": None}
        assert lines[0]["policy"] == policy
        keep_until(file, 0)
        assert file.read_text() == ""

    def test_markdown_keeps_its_cells(self):
        *_, row = samples_markdown([self.SAMPLE]).splitlines()
        assert row == r"| a\|b<br>c | no | [red]yes | -0.250 | +0.500 |"

    def test_the_table_shows_answers_as_they_are(self):
        text = shown([self.SAMPLE, Sample(2, "x" * 1000 + " end", self.SAMPLE.policy, None)])
        assert "[red]yes" in text
        assert "no ✂" in text
        assert "[reward -0.250, 9 tokens]" in text
        assert "…" in text
        assert "end" in text


def test_the_users_last_turn_is_told_apart_in_every_template_of_the_host():
    question = "Why [so], <b>\n\nthen?"
    for name in templates.names():
        tokenizer = templates.tokenizer(name)
        turns = [("user", "First?"), ("assistant", "Yes."), ("user", question)]
        chat = [{"role": role, "content": text} for role, text in turns]
        for history in (chat, chat[-1:]):
            prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
            assert user_turn(prompt, tokenizer) == question, name


def test_a_prompt_of_no_template_is_not_taken_apart(tokenizer):
    assert user_turn("Question: why?\nAnswer:", tokenizer) is None
    assert user_turn("Why?", object()) is None
