"""Preparation of preference data, side by side with stock axolotl, in one process and interleaved.

Both read the same JSON lines of argilla's shape and end with token ids that a trainer takes. Stock is axolotl's
``type: chat_template.argilla_chat`` followed by the tokenisation that TRL's trainer does with its result; ours is
``type: dpo_plugin.chat``, hashing and storing included.

    python benchmarks/data_prep.py [--rows 20000] [--repeats 3]
    python benchmarks/data_prep.py --memory 300000 1000000    # peak memory of ours alone, from parquet
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.support import tiny


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a system message in every fourth and two turns in every third; log-normal lengths."""
    draw = random.Random(seed)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "people",
        "discuss",
        "weather",
        "music",
        "code",
        "and",
        "paint",
        "in",
        "Paris",
    ]

    def text(median: float) -> str:
        return " ".join(draw.choices(words, k=max(1, int(draw.lognormvariate(0, 0.8) * median))))

    rows = []
    for number in range(count):
        history = [{"role": "system", "content": text(12)}] if number % 4 == 0 else []
        if number % 3 == 0:
            history += [{"role": "user", "content": text(40)}, {"role": "assistant", "content": text(60)}]
        history.append({"role": "user", "content": text(40)})
        answers = [{"role": "assistant", "content": f"{text(80)} {mark}"} for mark in "ab"]
        rows.append({"source": f"s{number % 3}", "chosen": [*history, answers[0]], "rejected": [*history, answers[1]]})
    return rows


def config(base: Path, file: Path, folder: Path, kind: str, **settings: Any) -> dict[str, Any]:
    """A config whose data is the file, read as this type."""
    data = [{"path": str(file), "ds_type": "json", "type": kind}]
    return tiny.dpo_config(base, folder / "out", datasets=data, sequence_len=2048, dataset_num_proc=None, **settings)


def stock(base: Path, file: Path, folder: Path) -> int:
    """Rows prepared by stock axolotl and TRL."""
    from axolotl.utils.data.rl import prepare_preference_datasets
    from trl import DPOConfig, DPOTrainer

    from tests.support.host import load_config

    cfg = load_config(config(base, file, folder, "chat_template.argilla_chat", plugins=None), folder)
    tokenizer = load_tokenizer(cfg)
    train, _ = prepare_preference_datasets(cfg, tokenizer)
    args = DPOConfig(output_dir=str(folder), max_length=2048, dataset_num_proc=cfg.dataset_num_proc, bf16=False)
    return len(DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), train, tokenizer, args, "train"))


def ours(base: Path, file: Path, folder: Path, **settings: Any) -> int:
    """Rows prepared by dpo_plugin."""
    from axolotl.integrations.base import PluginManager

    from tests.support.host import load_config

    cfg = load_config(config(base, file, folder, "dpo_plugin.chat", **settings), folder)
    return len(PluginManager.get_instance().load_datasets(cfg, preprocess=False).train_dataset)


def load_tokenizer(cfg: Any) -> Any:
    """The tokenizer of a config."""
    from axolotl.loaders import load_tokenizer as load

    return load(cfg)


def timed(job: Any, *arguments: Any, **settings: Any) -> tuple[float, int]:
    """Seconds and result."""
    started = time.perf_counter()
    result = job(*arguments, **settings)
    return time.perf_counter() - started, result


def write_parquet(file: Path, rows: int) -> None:
    """Rows of `make_rows`, told apart by their number, written a part at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = make_rows(min(rows, 20_000), 1)
    schema = pa.Table.from_pylist(part).schema
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, len(part)):
            for number, row in enumerate(part[: rows - start], start=start):
                for side in ("chosen", "rejected"):
                    answer = row[side][-1]
                    row[side] = [*row[side][:-1], {**answer, "content": f"{answer['content'].split('#')[0]}#{number}"}]
            writer.write_table(pa.Table.from_pylist(part[: rows - start], schema=schema))


def memory(rows: int) -> None:
    """Print peak memory and seconds of one preparation; a process of its own, since a peak never falls."""
    from dpo_plugin.data.formats import FORMATS
    from dpo_plugin.data.prepare import LengthLimit, Preparation, PrepareOptions
    from dpo_plugin.data.render import Renderer
    from dpo_plugin.data.sources import local_source

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "rows.parquet"
        # Not in this process, whose peak is to be that of preparation.
        code = f"import sys; sys.path[:0] = {sys.path!r}; import data_prep, pathlib as p; "
        subprocess.run(
            [sys.executable, "-c", f"{code}data_prep.write_parquet(p.Path({str(file)!r}), {rows})"], check=True
        )
        renderer, options = Renderer(tiny.tokenizer()), PrepareOptions(LengthLimit(2048))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = local_source({"path": str(file)})
        seconds, found = timed(
            Preparation("datasets[0]", source, FORMATS["chat"], renderer, options).load_or_run, Path(temporary)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = file.stat().st_size / 2**20
    print(
        f"{rows} rows ({size:.0f} MiB of parquet), {len(found[0])} kept: peak {peak / 2**20:.2f} GiB, of which "
        f"{before / 2**20:.2f} GiB before the first row; {seconds:.0f} s"
    )


def main() -> None:
    """Print rows/s of both, their ratio, and a second run of ours with another learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS", help="measure peak memory instead of speed")
    arguments = parser.parse_args()
    for rows in arguments.memory or ():
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:0] = {sys.path!r}; import data_prep; data_prep.memory({rows})",
            ],
            check=True,
        )
    if arguments.memory:
        return
    figures: dict[str, list[float]] = {"stock": [], "ours": [], "ours, second run": []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = tiny.save_base(root / "base")
        warm = tiny.write_rows(root / "warm.jsonl", make_rows(50, 0))
        for name, job in (("stock", stock), ("ours", ours)):
            (root / f"warm-{name}").mkdir()
            job(base, warm, root / f"warm-{name}")
        for repeat in range(arguments.repeats):
            file = tiny.write_rows(root / f"rows{repeat}.jsonl", make_rows(arguments.rows, repeat + 1))
            for name, job, settings in (
                ("stock", stock, {}),
                ("ours", ours, {}),
                ("ours, second run", ours, {"learning_rate": 3e-5}),
            ):
                folder = root / f"{name.split(',')[0]}{repeat}"
                folder.mkdir(exist_ok=True)
                seconds, rows = timed(job, base, file, folder, **settings)
                figures[name].append(seconds)
                print(f"{name:18} {seconds:7.2f} s  {rows} rows", file=sys.stderr, flush=True)
    report(arguments.rows, figures, arguments.json)


def report(rows: int, figures: dict[str, list[float]], file: Path | None) -> None:
    """Medians and spreads, and the ratio of medians."""
    medians = {name: statistics.median(seconds) for name, seconds in figures.items()}
    for name, seconds in figures.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f} s"
        print(f"{name:18} {rows / medians[name]:9.0f} rows/s   median {medians[name]:.2f} s ({spread})")
    ratios = [a / b for a, b in zip(figures["stock"], figures["ours"], strict=True)]
    print(f"ratio ours : stock {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    if file:
        machine = {"python": platform.python_version(), "cores": os.cpu_count()}
        file.write_text(json.dumps({"rows": rows, "seconds": figures, "ratios": ratios, **machine}, indent=1))


if __name__ == "__main__":
    main()
