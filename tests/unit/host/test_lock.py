"""An output folder is one run's."""

import json
import subprocess
import sys

import psutil
import pytest

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.output_dir.lock import LOCK, hold, release


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def write(folder, **changes):
    """Our own lock with changes, as another process would write it."""
    hold(folder)
    file = folder / LOCK
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_second_run_is_refused_and_told_by_whom(tmp_path, sleeper):
    write(tmp_path, pid=sleeper.pid, started=psutil.Process(sleeper.pid).create_time())
    with pytest.raises(ConfigError, match=f"process {sleeper.pid} on .*Write: output_dir: <another folder>$"):
        hold(tmp_path)
    release(tmp_path)
    assert (tmp_path / LOCK).exists()


def test_other_ranks_share_it(tmp_path, sleeper, monkeypatch):
    write(tmp_path, pid=sleeper.pid, started=psutil.Process(sleeper.pid).create_time())
    monkeypatch.setenv("RANK", "1")
    before = (tmp_path / ".dpo_plugin.lock").read_bytes()
    hold(tmp_path)
    assert (tmp_path / ".dpo_plugin.lock").read_bytes() == before


def test_a_process_may_take_it_twice_and_gives_it_back_at_its_end(tmp_path):
    take = "import sys; from pathlib import Path; from dpo_plugin.host.output_dir.lock import hold; hold(Path(sys.argv[1]));"
    held = " assert (Path(sys.argv[1]) / '.dpo_plugin.lock').exists(); hold(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", take + held, str(tmp_path)], check=True)
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_host_is_never_taken_over(tmp_path):
    write(tmp_path, host="elsewhere", pid=2**22 - 1)
    with pytest.raises(ConfigError, match=r"on elsewhere.*delete .*\.dpo_plugin\.lock"):
        hold(tmp_path)


@pytest.mark.parametrize("stale", ["dead", "process id used again", "torn"])
def test_a_stale_lock_is_taken_over(tmp_path, sleeper, stale):
    started = psutil.Process(sleeper.pid).create_time()
    if stale == "dead":
        sleeper.kill()
        sleeper.wait()
    write(tmp_path, pid=sleeper.pid, started=started - (100 if stale == "process id used again" else 0))
    if stale == "torn":
        (tmp_path / LOCK).write_text('{"pid": 1')
    hold(tmp_path)
    release(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        hold(tmp_path / "file" / "out")
