"""How far policy and reference may be apart before the first step, when both have the same weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_plugin.errors import ReferenceMismatchError
from dpo_plugin.types import PairLogps

LEAST_NOISE = 2**-16
"""Nats of rounding in one token's log-probability, however fine the dtype: log-sum-exp of a vocabulary in fp32."""


def tolerance(logps: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound |log π − log π_ref| by what rounding explains where π = π_ref, (sides,) nats.

    ε√n + one fp32 spacing of the sum, where ε, nats per token, is ``dtype``'s spacing at 1 and `LEAST_NOISE` at least.

    Policy and reference run the same kernels on the same shapes and are summed in a fixed order, so they are 0 apart on
    a CPU. The slack is for what rounds otherwise between two forwards: a product whose kernel depends on where its
    weights lie, a scatter without order in a mixture of experts, a compiled forward without gradient. Such errors are
    independent over tokens and grow as √n; so does what a wrong reference does at the least, which is why no number of
    tokens hides it. Nats over √n, measured on the tests' random model at 26 to 2,000 tokens:

        another attention kernel                      fp32 ≤ 8e-6     bf16 ≤ 2.5e-3
        torch.compile with and without gradient                       bf16 ≤ 3e-3
        ε                                             fp32 1.5e-5     bf16 7.8e-3
        the prompt shifted by one token               ≥ 2e-2
        dropout of 0.05 on what the adapter reads     ≥ 5e-2
        one weight of the reference adapter + 1       ≥ 8e-2
        no adapter, another adapter                   ≥ 0.35, 0.5

    One weight of the reference that is one bf16 spacing off makes 4e-5 to 2e-4 in fp32, which is not explained, and
    2.5e-3 in bf16, which is: there any other rounding makes as much.
    tests/unit/compute/test_step_zero.py holds all but the compiled one.

    Args:
        logps: (sides,) fp32 nats, summed over completion tokens.
        tokens: (sides,) completion tokens.
        dtype: The coarsest that the forward computes in.
    """
    noise = max(torch.finfo(dtype).eps, LEAST_NOISE)
    return noise * tokens.sqrt() + torch.finfo(torch.float32).eps * logps.abs()


class Deviation(NamedTuple):
    """The answer on which policy and reference differ most for its length: nats, its tokens, nats that are allowed."""

    nats: float
    tokens: int
    allowed: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains it; NaN is never explained."""
        return self.nats <= self.allowed


def largest_deviation(logps: PairLogps, dtype: torch.dtype) -> Deviation:
    """Find the deviation that exceeds its `tolerance` most in a forward whose coarsest dtype is this."""
    reference = torch.cat([logps.ref_chosen_logps, logps.ref_rejected_logps])
    tokens = torch.cat([logps.chosen_tokens, logps.rejected_tokens])
    apart = torch.cat([logps.chosen_logratios, logps.rejected_logratios]).detach().abs()
    allowed = tolerance(reference, tokens, dtype)
    worst = int((apart - allowed).argmax())
    return Deviation(apart[worst].item(), int(tokens[worst]), allowed[worst].item())


def check_policy_is_reference(logps: PairLogps, dtype: torch.dtype) -> None:
    """Check that policy and reference, which start from the same weights, give the same log-probs on one batch.

    Raises:
        ReferenceMismatchError: If they differ by more than rounding explains.
    """
    worst = largest_deviation(logps, dtype)
    if not worst.explained:
        raise ReferenceMismatchError(
            "before the first step policy and reference come from the same weights, so every reward must be 0, "
            f"but the largest is {logps.beta * worst.nats:.3g}: {worst.nats:.3g} nats over {worst.tokens} tokens, "
            f"where rounding explains {worst.allowed:.2g}. Something changes the model between the two forwards: "
            "another plugin, a patched kernel, or dropout. Remove it from the config."
        )
