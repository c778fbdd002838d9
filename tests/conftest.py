"""Fixtures: a tiny model and its adapters, made once per session."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.support import tiny


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen2 with its tokenizer."""
    return tiny.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sft_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on the tiny base whose weights are far from a fresh one's."""
    return tiny.save_adapter(base_dir, tmp_path_factory.mktemp("sft"))


def pytest_collection_finish() -> None:
    """All test modules are imported by now, and most of what they test."""
    import tests.support.frozen  # noqa: F401


def pytest_unconfigure() -> None:
    gc.unfreeze()
