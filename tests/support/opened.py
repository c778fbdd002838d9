"""Which files of a folder are opened, by any process."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
EVENT = struct.Struct("iIII")


@contextmanager
def opened_in(folder: Path) -> Iterator[set[str]]:
    """Context that fills a set with the names of files that were opened while it lasted (Linux, inotify)."""
    libc, names = ctypes.CDLL(None, use_errno=True), set[str]()
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        if watch < 0 or libc.inotify_add_watch(watch, os.fsencode(folder), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        yield names
        while data := read(watch):
            while data:
                *_, length = EVENT.unpack_from(data)
                names.add(os.fsdecode(data[EVENT.size : EVENT.size + length].rstrip(b"\0")))
                data = data[EVENT.size + length :]
    finally:
        os.close(watch)


def read(watch: int) -> bytes:
    try:
        return os.read(watch, 1 << 20)
    except BlockingIOError:
        return b""
