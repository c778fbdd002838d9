"""Rules for rows, and the rows that they leave, read back by the formats of training."""

import datetime
import json

import pytest

from dpo_plugin.data.formats import FORMATS, Columns
from dpo_plugin.data.keep import KeepRules, written_row
from dpo_plugin.data.suspects import Margins, PairChecks
from dpo_plugin.errors import ConfigError, DataError
from dpo_plugin.types import RenderedPair


class TestRules:
    @pytest.mark.parametrize(
        ("text", "names", "low", "high"),
        [
            ("unique", ("unique",), float("-inf"), float("inf")),
            ("new, consistent,new", ("new", "consistent"), float("-inf"), float("inf")),
            ("margin:-1..0.5", ("margin",), -1, 0.5),
            ("margin:..2", ("margin",), float("-inf"), 2),
            ("margin:1e-1..", ("margin",), 0.1, float("inf")),
        ],
    )
    def test_are_read(self, text, names, low, high):
        assert KeepRules.parse(text) == KeepRules(names, low, high)

    @pytest.mark.parametrize("text", ["", "uniq", "unique,", "unique:1", "margin", "Unique", "length"])
    def test_that_are_unknown_are_refused_with_those_that_are_known(self, text):
        with pytest.raises(ConfigError, match=r"unknown rule.*Known: unique, consistent, new, margin:LOW\.\.HIGH"):
            KeepRules.parse(text)

    @pytest.mark.parametrize("bounds", ["", "..", "1", "2..1", "a..b", "nan..1", "0..nan", "1...2"])
    def test_bounds_that_hold_nothing_are_refused(self, bounds):
        with pytest.raises(ConfigError, match="no bounds in nats per token. Write: margin:-1"):
            KeepRules.parse(f"margin:{bounds}")


class TestApplied:
    CHECKS = PairChecks(
        group=[0, 0, 2, 2, 4],
        same_prompt=2,
        near={},
        duplicates={},
        contradictions={0: None},
        both_sides=0,
        held_out={4: None},
    )
    MARGINS = Margins([9.0] * 5, [0.0, 0.5, -1.0, 1.0, 0.2])

    @pytest.mark.parametrize(
        ("rules", "kept", "dropped"),
        [
            ("unique", [0, 2, 4], {"unique": 2}),
            ("consistent", [1, 2, 3, 4], {"consistent": 1}),
            ("new", [0, 1, 2, 3], {"new": 1}),
            ("margin:0..0.5", [0, 1, 4], {"margin": 2}),
            ("margin:0.5..", [1, 3], {"margin": 3}),
            ("unique,consistent", [1, 2, 4], {"unique": 1, "consistent": 1}),
            ("unique,consistent,new,margin:-0.5..", [1, 3], {"unique": 0, "consistent": 1, "new": 1, "margin": 1}),
        ],
    )
    def test_a_pair_counts_for_the_first_rule_and_unique_comes_last(self, rules, kept, dropped):
        assert KeepRules.parse(rules).apply(self.CHECKS, self.MARGINS) == (kept, dropped)

    def test_order_changes_nothing(self):
        one, two = (KeepRules.parse(rules).apply(self.CHECKS, None) for rules in ("unique,new", "new,unique"))
        assert one[0] == two[0]
        assert one[1] == two[1]


ASK = {"role": "user", "content": "Why?"}
YES, NO = {"role": "assistant", "content": "Yes é"}, {"role": "assistant", "content": "No"}


def line(row, read="chat", columns=None):
    """A written row, and the pair that it was made of."""
    pair = FORMATS[read](row, columns or Columns())
    return json.loads(written_row(row, pair, "row 1")), pair


class TestWrittenRow:
    @pytest.mark.parametrize(
        "row",
        [
            {"chosen": [ASK, YES], "rejected": [ASK, NO], "score": 3, "source": "web"},
            {"prompt": "Why?", "chosen": "yes", "rejected": "no", "other": {"a": [1]}},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        ],
    )
    def test_is_the_row_itself_where_chat_reads_it(self, row):
        assert line(row)[0] == row

    def test_the_text_is_not_escaped(self):
        row = {"prompt": "Why?", "chosen": "é", "rejected": "no"}
        assert "é".encode() in written_row(row, FORMATS["chat"](row, Columns()), "row 1")

    def test_with_names_and_roles_of_its_own_it_is_its_messages(self):
        columns = Columns(chosen="best", rejected="worst", source="from_where", roles={"me": "user", "it": "assistant"})
        ask = {"role": "me", "content": "Why?"}
        row = {
            "best": [ask, {"role": "it", "content": "Yes"}],
            "worst": [ask, {"role": "it", "content": "No"}],
            "from_where": "web",
            "tools": [{"name": "search"}],
            "chat_template_kwargs": {"enable_thinking": True},
        }
        found, pair = line(row, "conversations", columns)
        assert FORMATS["chat"](found, Columns()) == pair
        assert found["source"] == "web"

    @pytest.mark.parametrize("value", [datetime.date(2020, 1, 1), b"bytes", "\ud800"])
    def test_a_column_that_json_cannot_hold_is_left_behind(self, value):
        row = {"prompt": "Why?", "chosen": "yes", "rejected": "no", "other": value}
        found, pair = line(row)
        assert "other" not in found
        assert FORMATS["chat"](found, Columns()) == pair

    def test_answers_that_begin_alike_stay_whole(self):
        """As two conversations, the shared first message would become part of the prompt."""
        think = {"role": "assistant", "content": "Hm."}
        columns = Columns(chosen="best", rejected="worst")
        row = {"prompt": "Why?", "best": [think, ASK, YES], "worst": [think, ASK, NO]}
        found, pair = line(row, "prompt", columns)
        assert FORMATS["chat"](found, Columns()) == pair
        assert len(pair.chosen) == 3

    def test_conversations_that_part_at_a_question(self):
        other = {"role": "user", "content": "How?"}
        columns = Columns(chosen="best", rejected="worst")
        found, pair = line({"best": [ASK, YES, ASK, YES], "worst": [ASK, YES, other, NO]}, "conversations", columns)
        assert FORMATS["chat"](found, Columns()) == pair
        assert pair.chosen[0] == ASK

    def test_rendered_text_stays_text(self):
        row = {"prompt": "Q: ", "chosen": "yes", "rejected": "no", "score": 1}
        assert line(row, "text")[0] == row
        columns = Columns(prompt="before")
        found, pair = line({"before": "Q: ", "chosen": "yes", "rejected": "no", "source": "web"}, "text", columns)
        assert FORMATS["text"](found, Columns()) == pair == RenderedPair("Q: ", "yes", "no", "web")

    def test_what_nothing_reads_is_an_error_that_names_it(self):
        pair = FORMATS["chat"]({"prompt": "Why?", "chosen": "yes", "rejected": "no"}, Columns())
        pair.chosen[0]["name"] = {1}  # no value of JSON
        with pytest.raises(DataError, match="row 7 cannot be written"):
            written_row({}, pair, "row 7")
