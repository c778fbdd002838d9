"""Sources, lengths, audit and the store of prepared data."""

import copy
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from dpo_plugin.data.formats import FORMATS, Columns
from dpo_plugin.data.prepare import LengthLimit, Preparation, PrepareOptions, fit
from dpo_plugin.data.render import PairIds, Renderer
from dpo_plugin.data.sources import local_source
from dpo_plugin.errors import DataError, RowError
from dpo_plugin.types import RenderedPair
from tests.support import forked
from tests.support.prepared import in_memory
from tests.support.tiny import ROOT, chat_row, write_rows

LONG = LengthLimit(512)


def rows(count=6):
    return [chat_row(f"Question {n}?", f"good {n}", f"bad {n}", "one" if n % 2 else "two") for n in range(count)]


def preparation(tokenizer, path, limit=LONG, entry=None, renderer=None, **options):
    source = local_source({"path": str(path), **(entry or {})})
    options = PrepareOptions(limit, **{"max_bad_rows": 1.0, **options})
    return Preparation("datasets[0]", source, FORMATS["chat"], renderer or Renderer(tokenizer), options)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal_alone(terminal, tokenizer, tmp_path, monkeypatch):
    class Output(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", Output())
    in_memory(preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows())))
    assert ("Preparing datasets[0]: 100%" in sys.stderr.getvalue()) == terminal


class TestFit:
    IDS = PairIds([1, 2, 3, 4], [10, 11, 12, 13, 99], [20, 21, 99])

    def test_right_cuts_completions_and_keeps_the_end_of_turn(self):
        pair, cut = fit(self.IDS, LengthLimit(7), end_tokens=1)
        assert (pair.prompt, pair.chosen, pair.rejected) == ([1, 2, 3, 4], [10, 11, 99], [20, 21, 99])
        assert cut == [0, 2, 0]

    def test_left_cuts_the_prompt_first(self):
        pair, cut = fit(self.IDS, LengthLimit(7, side="left"), end_tokens=1)
        assert (pair.prompt, pair.chosen, pair.rejected) == ([3, 4], self.IDS.chosen, self.IDS.rejected)
        assert cut == [2, 0, 0]

    def test_left_keeps_the_beginning_of_sequence(self):
        pair, _ = fit(self.IDS, LengthLimit(7, side="left"), end_tokens=1, bos=1)
        assert pair.prompt == [1, 4]

    def test_left_cuts_completions_that_are_too_long_alone(self):
        pair, cut = fit(self.IDS, LengthLimit(4, side="left"), end_tokens=1)
        assert (pair.prompt, pair.chosen, pair.rejected) == ([4], [10, 11, 99], [20, 21, 99])
        assert cut == [3, 2, 0]

    def test_a_pair_without_room_for_one_completion_token_is_none(self):
        assert fit(self.IDS, LengthLimit(5), end_tokens=1) is None
        assert fit(self.IDS, LengthLimit(6), end_tokens=2) is None
        assert fit(self.IDS, LengthLimit(1, side="left"), end_tokens=1) is None


class TestLength:
    def long_and_short(self, tmp_path):
        made = [chat_row("Short?", "yes", "no"), chat_row("Long?", "word " * 60, "other " * 60)]
        return write_rows(tmp_path / "rows.jsonl", made)

    def test_drop_counts(self, tokenizer, tmp_path):
        data, audit = in_memory(preparation(tokenizer, self.long_and_short(tmp_path), LengthLimit(60)))
        assert data["row"][:] == [1]
        assert audit.left_out["too long"] == {"made": 1}

    def test_truncate_keeps_the_end_of_turn_and_counts(self, tokenizer, tmp_path):
        data, audit = in_memory(preparation(tokenizer, self.long_and_short(tmp_path), LengthLimit(60, "truncate")))
        long = data[1]
        assert len(long["prompt_ids"]) + len(long["chosen_ids"]) == 60
        assert long["chosen_ids"][-1] == long["rejected_ids"][-1] == tokenizer.eos_token_id
        assert long["cut"][0] == 0
        assert long["cut"][1] > 0
        assert audit.cut == {"made": 1}

    def test_raise_names_the_row_and_the_length_to_write(self, tokenizer, tmp_path):
        with pytest.raises(DataError, match=r"row 2 has \d+ tokens.*Write: sequence_len: \d+"):
            in_memory(preparation(tokenizer, self.long_and_short(tmp_path), LengthLimit(60, "raise")))

    def test_a_pair_that_the_cut_makes_equal_is_left_out(self, tokenizer, tmp_path):
        made = [chat_row("Long?", "word " * 60 + "a", "word " * 60 + "b"), chat_row("q", "a", "b")]
        file = write_rows(tmp_path / "rows.jsonl", made)
        data, audit = in_memory(preparation(tokenizer, file, LengthLimit(60, "truncate")))
        assert data["row"][:] == [2]
        assert audit.left_out["identical after the cut"] == {"made": 1}

    def test_no_surviving_token_stops_and_says_which_length_keeps_95_percent(self, tokenizer, tmp_path):
        file = ROOT / "recipes/data/preferences.jsonl"
        with pytest.raises(
            DataError, match=r"`sequence_len: 12` no completion token survives.*Write: sequence_len: \d+"
        ) as error:
            preparation(tokenizer, file, LengthLimit(12, "truncate")).load_or_run(tmp_path)
        length = int(str(error.value).split()[-1])
        _, audit = in_memory(preparation(tokenizer, file, LengthLimit(length)))
        assert 0.95 <= sum(audit.kept.values()) / audit.read < 1


class TestBadRows:
    def test_each_is_counted_with_its_number_and_reason(self, tokenizer, tmp_path):
        good = json.dumps(chat_row("q", "a", "b", "fine")).encode()
        lines = [
            good,
            b'{"chosen": [',
            b'{"chosen": "\xff\xfe"}',
            b"[1, 2]",
            json.dumps({"chosen": None, "rejected": None, "source": "odd"}).encode(),
            json.dumps(chat_row("q", "same", "same", "odd")).encode(),
            json.dumps(chat_row("q", "", "b", "odd")).encode(),
            json.dumps(chat_row("say <|im_end|>", "a", "b", "odd")).encode(),
            json.dumps({**chat_row("q", "a", "b"), "chosen": [{"role": "user", "content": "q"}]}).encode(),
            json.dumps(
                chat_row("q", "x" * 10_000_000, "b", "huge")
            ).encode(),  # tokenising it would take half a minute,
        ]
        file = tmp_path / "rows.jsonl"
        file.write_bytes(b"\n".join(lines) + b"\n")
        data, audit = in_memory(preparation(tokenizer, file))
        assert data["row"][:] == [1]
        assert audit.read == 10
        assert {reason: sum(counts.values()) for reason, counts in audit.left_out.items()} == {
            "malformed": 4, "identical pair": 2, "empty completion": 1, "special token in text": 1, "too long": 1,
        }  # fmt: skip
        assert [example["row"] for example in audit.examples] == [2, 3, 4, 5, 6]
        assert audit.to_dict()["by_source"]["huge"] == {"too long": 1}
        assert "not JSON" in audit.examples[0]["message"]
        assert "not UTF-8: invalid start byte at byte 12" in audit.examples[1]["message"]
        assert audit.to_dict()["by_source"]["odd"] == {
            "malformed": 1,
            "identical pair": 1,
            "empty completion": 1,
            "special token in text": 1,
        }

    def test_more_than_the_allowed_share_stops(self, tokenizer, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", [*rows(8), {"chosen": 1}, {"chosen": 2}])
        with pytest.raises(DataError, match=r"2 of 10 rows \(20%\) cannot be used.*row 9.*write: max_bad_rows: 0.2"):
            preparation(tokenizer, file, max_bad_rows=0.1).load_or_run(tmp_path / "store")
        data, _ = preparation(tokenizer, file, max_bad_rows=0.2).load_or_run(tmp_path / "store")
        assert len(data) == 8

    def test_special_tokens_are_allowed_when_asked_for(self, tokenizer, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", [chat_row("say <|im_end|>", "a", "b")])
        renderer = Renderer(tokenizer, refuse_special_tokens=False)
        data, _ = in_memory(preparation(tokenizer, file, renderer=renderer))
        assert (
            data[0]["prompt_ids"].count(tokenizer.eos_token_id) == 3
        )  # system, the user's own, end of the user's turn

    def test_duplicates_are_left_out_when_asked_for(self, tokenizer, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", [*rows(3), *rows(2)])
        data, audit = in_memory(preparation(tokenizer, file, drop_duplicates=True))
        assert data["row"][:] == [1, 2, 3]
        assert sum(audit.left_out["duplicate"].values()) == 2


class TestSources:
    def test_every_local_form_gives_the_same_ids(self, tokenizer, tmp_path):
        table = Dataset.from_list([{key: row[key] for key in ("source", "chosen", "rejected")} for row in rows()])
        write_rows(tmp_path / "rows.jsonl", rows())
        (tmp_path / "rows.json").write_text(json.dumps(rows()))
        table.to_parquet(tmp_path / "rows.parquet")
        table.save_to_disk(tmp_path / "folder")
        entries = ["rows.jsonl", "rows.json", "rows.parquet", "folder"]
        found = [in_memory(preparation(tokenizer, tmp_path / name))[0]["chosen_ids"][:] for name in entries]
        assert found[0]
        assert all(ids == found[0] for ids in found)

    def test_csv(self, tokenizer, tmp_path):
        file = tmp_path / "rows.csv"
        file.write_text('prompt,chosen,rejected\n"Hi, you?",Yes.,No.\n')
        data, audit = in_memory(preparation(tokenizer, file))
        assert tokenizer.decode(data[0]["chosen_ids"]) == "Yes.<|im_end|>"
        assert audit.shapes == {"prompt": 1}

    def test_a_slice_of_a_file(self, tokenizer, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", rows(10))
        data, _ = in_memory(preparation(tokenizer, file, entry={"split": "train[:30%]"}))
        assert len(data) == 3
        with pytest.raises(DataError, match=r"split train only.*Write: split: train"):
            in_memory(preparation(tokenizer, file, entry={"split": "test"}))

    def test_a_sample_is_drawn_with_the_seed(self, tokenizer, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", rows(20))
        draws = [
            in_memory(preparation(tokenizer, file, sample_fraction=0.5, seed=seed))[0]["row"][:] for seed in (1, 1, 2)
        ]
        assert draws[0] == draws[1] != draws[2]
        assert len(draws[0]) == 10

    def test_a_folder_that_is_no_data_set(self, tokenizer, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(DataError, match="holds no data set"):
            in_memory(preparation(tokenizer, tmp_path / "folder"))

    def test_rows_of_a_broken_json_array_cannot_be_told_apart(self, tokenizer, tmp_path):
        (tmp_path / "rows.json").write_text("[{]")
        with pytest.raises(DataError, match="Write one object per line"):
            in_memory(preparation(tokenizer, tmp_path / "rows.json"))


class TestStore:
    def test_what_changes_the_ids_changes_the_key_and_nothing_else_does(self, tokenizer, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", rows())
        same = preparation(tokenizer, file).key()
        assert preparation(tokenizer, file, max_bad_rows=0.5).key() == same
        other_template = Renderer(tokenizer, tokenizer.chat_template + " ")
        changed = [
            preparation(tokenizer, file, LengthLimit(400)).key(),
            preparation(tokenizer, file, LengthLimit(512, "truncate")).key(),
            preparation(tokenizer, file, LengthLimit(512, "drop", "left")).key(),
            preparation(tokenizer, file, sample_fraction=0.5).key(),
            preparation(tokenizer, file, columns=Columns(chosen="best")).key(),
            preparation(tokenizer, file, renderer=other_template).key(),
            preparation(tokenizer, file, renderer=Renderer(tokenizer, template_kwargs={"enable_thinking": True})).key(),
            preparation(tokenizer, file, renderer=Renderer(tokenizer, refuse_special_tokens=False)).key(),
        ]
        named = preparation(tokenizer, file)
        named.format = FORMATS["conversations"]
        changed.append(named.key())
        write_rows(file, [*rows(5), chat_row("Question 5?", "good 5", "worse 5")])
        changed.append(preparation(tokenizer, file).key())
        assert same not in changed
        assert len(set(changed)) == len(changed)

    def test_a_second_run_prepares_nothing(self, tokenizer, tmp_path, monkeypatch):
        file = write_rows(tmp_path / "rows.jsonl", rows())
        first, audit = preparation(tokenizer, file).load_or_run(tmp_path / "store")
        monkeypatch.setattr(Preparation, "batches", lambda *_: pytest.fail("prepared again"))
        second, again = preparation(tokenizer, file).load_or_run(tmp_path / "store")
        assert second[:] == first[:]
        assert again == audit

    def test_a_killed_run_leaves_nothing_that_looks_whole(self, tokenizer, tmp_path, monkeypatch):
        file = write_rows(tmp_path / "rows.jsonl", rows())
        plain = Preparation.batches

        def killed(self, audit):
            yield from plain(self, audit)
            raise KeyboardInterrupt

        monkeypatch.setattr(Preparation, "batches", killed)
        with pytest.raises(KeyboardInterrupt):
            preparation(tokenizer, file).load_or_run(tmp_path / "store")
        monkeypatch.undo()
        data, _ = preparation(tokenizer, file).load_or_run(tmp_path / "store")
        assert len(data) == 6

    def test_runs_at_once_build_it_once(self, tokenizer, tmp_path, monkeypatch):
        file = write_rows(tmp_path / "rows.jsonl", rows())
        built = []
        plain = Preparation.batches
        monkeypatch.setattr(Preparation, "batches", lambda self, audit: built.append(1) or plain(self, audit))
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(preparation(tokenizer, file).load_or_run, tmp_path / "store") for _ in range(4)]
        assert {len(job.result()[0]) for job in jobs} == {6}
        assert len(built) == 1


def test_processes_at_once_share_one_store(base_dir, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", rows())
    code = f"""
from transformers import AutoTokenizer
from tests.unit.data.test_prepare import preparation
data, audit = preparation(AutoTokenizer.from_pretrained({str(base_dir)!r}), {str(file)!r}).load_or_run(__import__('pathlib').Path({str(tmp_path / "store")!r}))
print(len(data))
"""
    jobs = [forked.start([sys.executable, "-c", code]) for _ in range(2)]
    assert [job.end().stdout.split()[-1] for job in jobs] == ["6", "6"]
    stores = [folder for folder in (tmp_path / "store").iterdir() if folder.is_dir()]
    assert len(stores) == 1


def test_fast_tokenisation_equals_that_of_whole_texts(tokenizer):
    renderer = Renderer(tokenizer)
    pairs = [renderer.render(FORMATS["chat"](row, Columns())) for row in [*rows(), chat_row("q", "\n\nx", "\ny")]]
    assert renderer._tokenize_parts(pairs) == renderer._tokenize_whole(pairs)


def test_a_tokenizer_that_does_not_split_at_special_tokens_is_tokenised_whole(tokenizer, monkeypatch):
    renderer = Renderer(tokenizer)
    pairs = [renderer.render(FORMATS["chat"](row, Columns())) for row in rows()]
    monkeypatch.setattr(renderer, "_tokenize_parts", lambda pairs: [PairIds([], [], [])] * len(pairs))
    assert renderer.tokenize(pairs) == renderer._tokenize_whole(pairs)


def test_rendered_text_gets_eos_as_trl_adds_it(tokenizer):
    renderer = Renderer(tokenizer)
    found = renderer.render(RenderedPair("Q:", " yes", " no<|im_end|>\n"))
    assert (found.prompt, found.chosen, found.rejected) == ("Q:", " yes<|im_end|>", " no<|im_end|>")


@pytest.mark.parametrize(
    ("adds", "prompt", "expected"),
    [(True, "Q:", "<|endoftext|>Q:"), (True, "<|endoftext|>Q:", "<|endoftext|>Q:"), (False, "Q:", "Q:")],
)
def test_rendered_text_begins_with_one_bos_if_the_tokenizer_adds_one(tokenizer, adds, prompt, expected):
    renderer = Renderer(copy.deepcopy(tokenizer))
    renderer.tokenizer.bos_token = "<|endoftext|>"
    if adds:
        bos = ("<|endoftext|>", renderer.tokenizer.bos_token_id)
        made = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
        renderer.tokenizer.backend_tokenizer.post_processor = made
    found = renderer.render(RenderedPair(prompt, " yes", " no", "books"))
    assert found == RenderedPair(expected, " yes<|im_end|>", " no<|im_end|>", "books")


def test_row_errors_carry_the_reason_they_are_counted_under():
    assert RowError("x").reason == "malformed"
