"""What all tests on ranks compare with: an SFT adapter of the recipes' rank, and runs of one process."""

import pytest

from tests.ranks.shipped import config
from tests.support import tiny
from tests.support.cpu_ranks import launch


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """The tiny base with two layers: what ranks tell each other is told for each layer again."""
    return tiny.save_base(tmp_path_factory.mktemp("base"), layers=2)


@pytest.fixture(scope="session")
def sft(base_dir, tmp_path_factory):
    return tiny.save_adapter(base_dir, tmp_path_factory.mktemp("sft16"), r=16, lora_alpha=16)


@pytest.fixture(scope="session")
def alone(base_dir, sft, tmp_path_factory):
    """One process with the same global batch, in 4 bit and in bf16."""
    found = {}

    def run(name):
        precision = name.split("-")[1]
        if precision not in found:
            folder = tmp_path_factory.mktemp(f"alone-{precision}")
            engine = {"deepspeed": None, "fsdp_version": None, "fsdp_config": None}
            like = "ddp-nf4" if precision == "nf4" else "fsdp2-bf16"
            found[precision] = launch(
                config(like, base_dir, sft, folder, **engine, micro_batch_size=4, save_strategy="no", save_steps=None),
                folder,
                ranks=1,
            )
            assert found[precision].returncode == 0, found[precision].error()
        return found[precision]

    return run
