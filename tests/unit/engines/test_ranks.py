"""Two real gloo ranks that differ stop with the difference."""

import subprocess
import sys
import textwrap

SCRIPT = """
import os, sys
import torch.distributed as dist
from dpo_plugin.engines.ranks import check_ranks_agree

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
check_ranks_agree({"number of micro-steps per epoch": 7, "adapters": "policy a"})
print("agreed", flush=True)
check_ranks_agree({"number of micro-steps per epoch": 7 + rank, "adapters": "policy a"})
"""


def test_ranks_that_differ_all_stop_with_the_difference(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        said, complained = rank.communicate(timeout=120)
        assert "agreed" in said
        assert "RankMismatchError" in complained
        assert "rank 1: number of micro-steps per epoch is 8, on rank 0 it is 7" in complained
        assert "adapters is" not in complained
        assert rank.returncode != 0  # 1, or an abort of gloo's threads where the other rank left first
