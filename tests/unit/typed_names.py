"""Read by mypy (`make types`), never run: the package's lazy names have their types, and are not ``Any``."""

from typing import Any, assert_type

import dpo_plugin
from dpo_plugin import PairLogps, PreferencePair

assert_type(dpo_plugin.__version__, str)
assert_type(dpo_plugin.DPOPluginConfig().report, bool)
assert_type(dpo_plugin.DPOPluginError("said").args, tuple[Any, ...])


def source_of(pair: PreferencePair) -> None:
    assert_type(pair.source, str)


def beta_of(logps: PairLogps) -> None:
    assert_type(logps.beta, float)


def prompts_of(message: dpo_plugin.Message) -> None:
    assert_type(message["content"], str)
