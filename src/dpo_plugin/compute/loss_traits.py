"""What losses declare about themselves, and options of the YAML checked against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from dpo_plugin.config import LossConfig
from dpo_plugin.errors import ConfigError

Loss = Callable[..., Tensor]
AnyLoss = TypeVar("AnyLoss", bound=Loss)


@dataclass(frozen=True)
class LossTraits:
    """What a loss declares about itself, as its decorator: ``@LossTraits(couples_pairs=True)``.

    Attributes:
        couples_pairs: Whether a pair's loss depends on the other pairs of the batch, which then cannot be split.
        uses_label_smoothing: Whether it uses ε.
        needs_label_smoothing: Whether ε must be above 0.
        takes_divergence: Whether another f-divergence than the reverse KL has a meaning for it: it is a function of the
            difference of two scores, in which β log Z(x) cancels, or has no score. TRL refuses the others too
            (trl 6559).
    """

    couples_pairs: bool = False
    uses_label_smoothing: bool = False
    needs_label_smoothing: bool = False
    takes_divergence: bool = False

    def __call__(self, loss: AnyLoss) -> AnyLoss:
        """Attach the traits to a loss."""
        loss.traits = self  # type: ignore[attr-defined]
        return loss


UNDECLARED = LossTraits(couples_pairs=True, uses_label_smoothing=True, takes_divergence=True)
"""Traits of a function that declares none: its batch is not split, and no option of the YAML is refused for it."""


def traits_of(loss: Loss) -> LossTraits:
    """Give what a loss declares, or `UNDECLARED`."""
    traits: LossTraits = getattr(loss, "traits", UNDECLARED)
    return traits


def check_split(losses: Mapping[str, Loss]) -> None:
    """Check that a micro-batch may be split over several forwards.

    Raises:
        ConfigError: For the first loss that sees pairs together, or does not declare that it does not.
    """
    coupled = [name for name, loss in losses.items() if traits_of(loss).couples_pairs]
    if not coupled:
        return
    may = "does not declare that it sees each pair alone (@LossTraits() of dpo_plugin.compute.loss_traits)"
    says = "sees its pairs together" if hasattr(losses[coupled[0]], "traits") else may
    raise ConfigError(
        f"`dpo_plugin.compute.max_tokens` splits a micro-batch, but the loss {coupled[0]!r} {says}. "
        "Remove max_tokens. Write: max_tokens: null"
    )


def check_divergence(config: LossConfig, losses: Mapping[str, Loss], registered: Mapping[str, Loss]) -> None:
    """Check that the config's f-divergence has a meaning for every loss of the run.

    Raises:
        ConfigError: Naming the losses that it has none for, and those that take it.
    """
    given = config.f_divergence
    plain = given == "reverse_kl" or (given == "alpha_divergence" and config.f_alpha == 1)
    refused = [name for name, loss in losses.items() if not traits_of(loss).takes_divergence]
    if refused and not plain:
        takers = sorted(name for name, loss in registered.items() if traits_of(loss).takes_divergence)
        raise ConfigError(
            f"`dpo_plugin.loss.f_divergence: {given}` has no meaning for the loss {', '.join(refused)}, which is not "
            f"a function of the difference of two scores; it has for {', '.join(takers)}. "
            "Write: f_divergence: reverse_kl"
        )


def check_smoothing(given: Any, losses: Mapping[str, Loss], registered: Mapping[str, Loss]) -> None:
    """Check the value of ``dpo_label_smoothing`` against what the losses of the run do with it.

    Raises:
        ConfigError: If no loss uses it, one needs it, or it is not a share below one half.
    """
    smoothing = given or 0
    if smoothing and not any(traits_of(loss).uses_label_smoothing for loss in losses.values()):
        users = sorted(name for name, loss in registered.items() if traits_of(loss).uses_label_smoothing)
        raise ConfigError(
            f"`dpo_label_smoothing: {given}` is not used by {', '.join(losses)}, only by {', '.join(users)}. "
            "Write: dpo_label_smoothing: 0"
        )
    needs = [name for name, loss in losses.items() if traits_of(loss).needs_label_smoothing]
    if needs and not 0 < smoothing < 0.5:
        raise ConfigError(
            f"`dpo_label_smoothing: {given}` must be above 0 and below 0.5 for the loss {needs[0]}, which takes its "
            "logarithm. Write: dpo_label_smoothing: 0.001"
        )
    if not 0 <= smoothing < 0.5:
        raise ConfigError(
            f"`dpo_label_smoothing: {given}` is the share of flipped preferences, at least 0 and below 0.5. "
            "Write: dpo_label_smoothing: 0.1"
        )
