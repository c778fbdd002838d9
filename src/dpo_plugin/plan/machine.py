"""A node, what a model needs of it, and whether that fits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """GPUs of one node, and bytes of each of them and of the host."""

    gpus: int
    gpu: int
    host: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on each GPU in a step and while loading, by what they are, and on the host for all ranks."""

    parts: dict[str, int]
    load_parts: dict[str, int]
    loss: int
    host: int

    @property
    def load(self) -> int:
        """The peak of loading on each GPU."""
        return sum(self.load_parts.values())

    @property
    def step(self) -> int:
        """The peak of a step on each GPU."""
        return sum(self.parts.values())

    def limit(self, machine: Machine) -> str | None:
        """What does not fit, load, step or host; None if all does."""
        over = {"load": self.load - machine.gpu, "step": self.step - machine.gpu, "host": self.host - machine.host}
        return next((name for name, excess in over.items() if excess > 0), None)
