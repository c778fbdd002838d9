"""Which checkpoint a run may resume from: a complete one, made with the same base, reference and adapter settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dpo_plugin.engines.ranks import gather_object
from dpo_plugin.errors import CheckpointError
from dpo_plugin.host.log import LOG
from dpo_plugin.model.adapter_config import adapter_facts

MARKER = "dpo_plugin.json"
_YAML_KEYS = {"r": "lora_r", "use_dora": "peft_use_dora", "use_rslora": "peft_use_rslora"}


@dataclass(frozen=True)
class Origin:
    """What a checkpoint must have been trained with to be resumed.

    Attributes:
        reference: ``strategy`` and ``identity`` (a digest).
        base: Digest of the base model as loaded.
        adapter: The policy's `adapter_facts`, or None in full fine-tuning.
        master_weights: Whether bf16 weights are updated in fp32, or None where the engine leaves no choice.
    """

    reference: Mapping[str, str]
    base: str
    adapter: Mapping[str, Any] | None = None
    master_weights: bool | None = None


# ── the marker: says what a folder was trained with, and, once it is whole, the digest of each of its files ──


def write_marker(folder: Path, origin: Origin, files: Mapping[str, str] | None = None) -> None:
    """Write into a saved folder what it was trained with, and of a checkpoint that is whole its `file_digests`."""
    content: dict[str, Any] = {
        "dpo_plugin": version("dpo-plugin"),
        "reference": dict(origin.reference),
        "base": origin.base,
    }
    if origin.master_weights is not None:
        content["master_weights"] = origin.master_weights
    if files is not None:
        content["files"] = dict(files)
    text = json.dumps({**content, "digest": _digest_of(content)}, indent=2)
    unfinished = folder / f".{MARKER}"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(folder / MARKER)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Read what `write_marker` wrote; None if it cannot be read or has changed."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return content if digest == _digest_of(content) else None


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Compute path in the folder → SHA-256 for all files but the marker.

    Raises:
        OSError: If one cannot be read.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (MARKER, f".{MARKER}"))
    with ThreadPoolExecutor() as threads:  # hashing and reading release the interpreter's lock
        digests = list(threads.map(_sha256, files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ── at the start of a run ──


def fault(folder: Path) -> str | None:
    """Say why a checkpoint cannot be resumed; None if each of its files is as it was saved."""
    if not (folder / "trainer_state.json").is_file():
        return "is incomplete: trainer_state.json is missing"
    if (content := read_marker(folder)) is None:
        return f"is incomplete or damaged: {MARKER} cannot be read"
    if (saved := content.get("files")) is None:
        return f"is incomplete: {MARKER} names no files"
    try:
        found = file_digests(folder)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    for name, digest in saved.items():
        if found.get(name) != digest:
            return f"is incomplete or damaged: {name} is {'changed' if name in found else 'missing'}"
    return None


def checkpoint_to_resume(
    asked: str | bool | None, named_by_user: bool, output_dir: Path, origin: Origin, local_main: bool = True
) -> str | None:
    """Find the checkpoint that a run resumes from, the same on all ranks; all ranks must call.

    Args:
        asked: What the host passes to ``Trainer.train``.
        named_by_user: Whether the YAML names it; otherwise it is the newest, which may be incomplete.
        output_dir: Where checkpoints are.
        origin: What this run trains with.
        local_main: Whether this process reads the files for its node.

    Raises:
        CheckpointError: On all ranks, if the one to resume was trained with something else, or the YAML names one that
            is incomplete.
    """
    if not asked:
        return None
    found, refusal = None, None
    if local_main:
        try:
            named = Path(asked) if named_by_user and isinstance(asked, str) else None
            found = _named(named, origin) if named else _newest(output_dir, origin)
        except CheckpointError as error:
            refusal = str(error)
    answers = gather_object((local_main, found, refusal))
    for _, _, message in answers:
        if message is not None:
            raise CheckpointError(message)
    on_nodes = [folder for reads, folder, _ in answers if reads]
    return None if None in on_nodes else str(min(on_nodes, key=_step))


def _named(folder: Path, origin: Origin) -> Path:
    _refuse_foreign(folder)
    if (reason := fault(folder) or _not_resumable(folder)) is not None:
        raise CheckpointError(f"`resume_from_checkpoint: {folder}` {reason}. Write: resume_from_checkpoint: <another>")
    check_origin(folder, origin)
    return folder


def _newest(output_dir: Path, origin: Origin) -> Path | None:
    without_optimizer = None
    for folder in sorted(filter(_step, output_dir.glob("checkpoint-*")), key=_step, reverse=True):
        _refuse_foreign(folder)
        if (reason := fault(folder)) is not None:
            LOG.warning(f"dpo_plugin: {folder} {reason}; it is skipped")
        elif _not_resumable(folder) is None:
            check_origin(folder, origin)
            return folder
        else:
            without_optimizer = without_optimizer or folder
    if without_optimizer is not None:
        raise CheckpointError(
            f"`auto_resume_from_checkpoints`: {without_optimizer} {_not_resumable(without_optimizer)}. To start a new "
            f"run from it, write: auto_resume_from_checkpoints: false and lora_model_dir: {without_optimizer}"
        )
    return None


def _step(folder: Path) -> int:
    number = folder.name.split("-")[-1]
    return int(number) if number.isdigit() else 0


def _refuse_foreign(folder: Path) -> None:
    if (folder / "trainer_state.json").exists() and not (folder / MARKER).exists():
        raise CheckpointError(
            f"the checkpoint {folder} does not say which reference it was trained against, so it is not dpo_plugin's. "
            f"To start a new run from its adapter, write: lora_model_dir: {folder}"
        )


def _not_resumable(folder: Path) -> str | None:
    """Say why a complete checkpoint cannot be resumed: transformers would start a fresh optimizer without a word."""
    saved = (read_marker(folder) or {}).get("files", {})
    if any(name.startswith(("optimizer", "global_step")) for name in saved):
        return None
    return "holds no optimizer (`save_only_model: true`), without which the run would end with other weights"


def check_origin(folder: Path, origin: Origin) -> None:
    """Refuse a complete checkpoint that was trained with something else, naming what differs."""
    made_with = read_marker(folder) or {}
    if made_with["reference"] != dict(origin.reference):
        raise CheckpointError(
            f"the checkpoint {folder} was trained against the reference {' '.join(made_with['reference'].values())}, "
            f"and this run has {' '.join(origin.reference.values())}. Rewards of the two are not comparable. Put back "
            "the old reference, or start anew: auto_resume_from_checkpoints: false"
        )
    if made_with["base"] != origin.base:
        raise CheckpointError(
            f"the checkpoint {folder} was trained on the base model {made_with['base'][:12]}, and this run has "
            f"{origin.base[:12]}: weights, quantisation, vocabulary or `overrides_of_model_config` have changed. Put "
            "back the old base_model, or start anew: auto_resume_from_checkpoints: false"
        )
    theirs = made_with.get("master_weights", False)  # older checkpoints do not say, and had none
    if origin.master_weights not in (None, theirs):
        raise CheckpointError(
            f"the checkpoint {folder} was trained {'with' if theirs else 'without'} fp32 master weights, and this run "
            f"is {'without' if theirs else 'with'}: its optimizer would go on from other weights. "
            f"Write: dpo_plugin: {{compute: {{master_weights: {str(theirs).lower()}}}}}"
        )
    if origin.adapter is not None:
        _check_adapter(folder, origin.adapter)


def _check_adapter(folder: Path, adapter: Mapping[str, Any]) -> None:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"the checkpoint {folder} holds no {file.name}. Write: resume_from_checkpoint: <another>")
    with safe_open(file, framework="pt") as tensors:
        saved = adapter_facts(json.loads((folder / "adapter_config.json").read_text("utf-8")), tensors.keys())
    for name in sorted({*saved, *adapter}):
        theirs, ours = saved.get(name), adapter.get(name)
        if theirs != ours:
            key = _YAML_KEYS.get(name, name)
            raise CheckpointError(
                f"the adapter of the checkpoint {folder} has `{name}: {theirs}`, and this run `{name}: {ours}`, which "
                f"makes another policy of the same weights. Write: {key}: {theirs}"
            )
