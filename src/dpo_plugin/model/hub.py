"""An adapter that the YAML names by its repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dpo_plugin.errors import AdapterError
from dpo_plugin.model.adapters import AdapterFolder

FILES = ["adapter_config.json", "adapter_model.*"]


def open_adapter(path: str, key: str) -> AdapterFolder:
    """The adapter in a folder, or in a repository whose files are fetched into the hub's cache.

    Args:
        path: The folder, or ``<owner>/<name>``; a folder that is there comes first.
        key: The YAML key that named it, for messages.

    Raises:
        AdapterError: If there is neither, the hub cannot be reached, or the adapter cannot be used.
    """
    if Path(path).expanduser().exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return AdapterFolder.open(path, key)
    try:
        folder = snapshot_download(path, allow_patterns=FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        offline = constants.HF_HUB_OFFLINE or isinstance(error, LocalEntryNotFoundError)
        why = "is not in the hub's cache, and the hub is not reached from here" if offline else "is not on the hub"
        unset = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise AdapterError(
            f"`{key}: {path}` does not exist as a folder and {why} ({type(error).__name__}{unset}). "
            f"Fetch it with `hf download {path}` where there is a network, or write: {key.rpartition('.')[2]}: <folder "
            "with adapter_config.json>"
        ) from error
    return AdapterFolder.open(folder, key)
