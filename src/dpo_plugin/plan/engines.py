"""Bytes that DDP, ZeRO-3 and FSDP2 hold besides activations; docs/plan.md has sums and sources."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dpo_plugin.plan.sizes import Sizes

COLUMNS = {"ddp": "DDP", "zero3": "ZeRO-3", "zero3_offload": "ZeRO-3 + CPU", "fsdp2": "FSDP2"}
"""What is planned, with its heading in the table."""


@dataclass(frozen=True)
class PlanInput:
    """What decides how many bytes a model takes on an engine.

    Attributes:
        ranks: Processes, one per GPU, on one node.
        bits: 4 or 8 bits per quantised weight, or None.
        double_quant: Whether NF4's block maxima are quantised again.
        packed: Bytes per element of the tensor that 4-bit weights are packed in.
        width: Bytes per value of the base model, 2 or 4.
        moments: Bytes of optimizer states per trained value; None for AdamW, two of the value's own dtype.
        fused: Whether the optimizer's step makes no copy of a state.
        upcast: Whether axolotl takes embeddings, norms and head to fp32 when it has loaded them.
        stays_fp32: Whether they stay so until the trainer is made, as in full fine-tuning on one GPU or DDP.
        masters: Whether the optimizer's fp32 master weights are ours, as in full fine-tuning in bf16.
        second_model: Whether the reference is a model of its own.
        checkpointed: Whether decoder layers run again in backward.
        in_parts: Whether ZeRO-3 or FSDP2 takes a 4-bit base in parts from a copy on disk (engines/loading.py).
    """

    ranks: int
    bits: int | None = None
    double_quant: bool = True
    packed: int = 2
    width: int = 2
    moments: float | None = None
    fused: bool = False
    upcast: bool = True
    stays_fp32: bool = False
    masters: bool = False
    second_model: bool = False
    checkpointed: bool = True
    in_parts: bool = False

    def states(self, values: int, width: float) -> int:
        """Optimizer-state bytes for ``values`` parameters of ``width`` bytes."""
        return int(values * (2 * width if self.moments is None else self.moments))


@dataclass(frozen=True)
class Zero3:
    """ZeRO-3's settings, in values unless said otherwise; defaults of deepspeed/runtime/zero/config.py."""

    persistence: int = 100_000
    prefetch: int = 50_000_000
    bucket: int = 500_000_000
    live: int = 10**9
    reuse: int = 10**9
    sub_group: int = 10**9
    width: int = 2  # bytes per value of what is not quantised
    offload_parameters: bool = False
    offload_optimizer: bool = False


@dataclass(frozen=True)
class EngineBytes:
    """Bytes that an engine holds; activations and CUDA's own memory come on top.

    Attributes:
        parts: On each GPU from the second step on, by what it is.
        load_parts: On each GPU at the peak before the first step, by what it is.
        host: The most on the host, for all ranks.
        update: What the optimizer's step takes above ``parts``, when activations are gone.
    """

    parts: dict[str, int]
    load_parts: dict[str, int]
    host: int = 0
    update: int = 0

    @property
    def load(self) -> int:
        """The most on each GPU before the first step."""
        return sum(self.load_parts.values())


def linear_bytes(sizes: Sizes, given: PlanInput) -> tuple[int, int]:
    """Count bytes of the linear weights and of their quantisation states.

    NF4 has a maximum per block of 64 weights: fp32, or with double quantisation 8 bits and fp32 per 256 of them
    (arXiv 2305.14314, section 3); 8 bits have an fp32 scale per row (arXiv 2208.07339).
    """
    if given.bits == 4:
        blocks = [-(-n // 64) for n in sizes.linear]
        states = sum(b + 4 * -(-b // 256) for b in blocks) if given.double_quant else 4 * sum(blocks)
        return sum(-(-n // 2) for n in sizes.linear), states
    return (sum(sizes.linear), 4 * sizes.rows) if given.bits == 8 else (sum(sizes.linear) * given.width, 0)


def one_in_full(sizes: Sizes, given: PlanInput) -> int:
    """Count bytes of the largest quantised weight in full, as backward makes it (bitsandbytes, MatMul4Bit.backward).

    Experts' weights are made in full in the forward, and backward needs them: of one layer where layers are
    checkpointed, else of all (bitsandbytes, nn/parametrize.py).
    """
    experts = sizes.layer_experts * (1 if given.checkpointed else sizes.layers)
    return max(*sizes.linear, experts) * given.width if given.bits else 0


def load_whole(sizes: Sizes, given: PlanInput, upcast: bool) -> dict[str, int]:
    """The most while a rank loads the whole model onto its GPU and attaches the adapters in fp32.

    Quantising holds one weight in full (transformers/core_model_loading.py takes no threads then). axolotl takes
    embeddings, norms and head to fp32 and back (axolotl/loaders/model.py, _configure_embedding_dtypes).
    """
    base = sum(linear_bytes(sizes, given)) + sum(sizes.other) * given.width
    wider = sum(sizes.other) * (4 - given.width) + max(sizes.other) * given.width if upcast and given.width < 4 else 0
    quantised = max(sizes.linear) * given.width * bool(given.bits)
    return {"base weights": base, "transient": max(quantised, wider, 4 * adapter_values(sizes))}


def load_in_parts(sizes: Sizes, given: PlanInput, base: int, adapters: int, transient: int) -> dict[str, int]:
    """The most while a rank's engine takes a 4-bit base in parts from a copy on disk.

    Before, on one GPU, each weight is in full and in 4 bits while the copy is made.

    Args:
        sizes: The model.
        given: How it is held.
        base: Bytes that stay: the rank's shards and the quantisation states.
        adapters: The same of both adapters.
        transient: Most bytes that are whole at a time.
    """
    largest = max(sizes.linear)
    copied = largest * given.width + sum(linear_bytes(replace(sizes, linear=(largest,)), given))
    loaded = {"base weights": base, "adapters": adapters, "transient": transient}
    return loaded if sum(loaded.values()) >= copied else {"transient": copied}


def adapter_values(sizes: Sizes) -> int:
    """Count values of both adapters."""
    return sum(sizes.policy) + sum(sizes.reference)


def ddp(sizes: Sizes, given: PlanInput) -> EngineBytes:
    """Everything on every rank; with more than one rank, gradients once more in DDP's buckets.

    With master weights, gradients of 2 bytes become 4 in the optimizer's step, one parameter at a time.
    """
    linear = sum(linear_bytes(sizes, given))
    loaded = linear + sum(sizes.other) * (4 if given.stays_fp32 else given.width)
    base = linear + sum(sizes.other) * given.width if given.masters else loaded
    trained = 4 * sum(sizes.policy) or base
    master = 4 * sizes.trained * given.masters
    updated = master or trained
    parts = {
        "base weights": base,
        "reference model": base * given.second_model,
        "adapters": 4 * adapter_values(sizes),
        **({"master weights": master} if master else {}),
        "gradients": trained,
        "optimizer": given.states(sizes.trained, updated / sizes.trained),
        "communication": trained if given.ranks > 1 else 0,
        "weight in full": one_in_full(sizes, given),
    }
    load = load_whole(sizes, given, given.upcast) | {"reference model": loaded * given.second_model}
    return EngineBytes(parts, load, 0, updated - trained + updated * (not given.fused))


def zero3(sizes: Sizes, given: PlanInput, zero: Zero3) -> EngineBytes:
    """Parameters, gradients and optimizer states in equal parts, but not everything.

    DeepSpeed partitions ``param.data``, so a quantised weight's states stay whole. So does, beside its partition, a
    parameter of at most ``persistence`` values (parameter_offload.py). Gathered are at most ``live`` values, or
    ``reuse`` that are needed again soon, or the largest, and ``prefetch`` (partitioned_param_coordinator.py).
    """
    width, ranks, copies = zero.width, given.ranks, 1 + given.second_model
    linear, states = linear_bytes(sizes, replace(given, width=width))
    element = {4: given.packed, 8: 1}.get(given.bits or 0, width)
    per_value = linear / sum(sizes.linear) / element
    base = [(round(n * per_value), element) for n in sizes.linear] + [(n, width) for n in sizes.other]
    adapters = [(n, width) for n in (*sizes.policy, *sizes.reference)]
    total, total_adapters = _bytes(base), _bytes(adapters)
    small, small_adapters = (_bytes((n, w) for n, w in g if n <= zero.persistence) for g in (base, adapters))
    window = width * (max(zero.live, zero.reuse, max(n for n, _ in base)) + zero.prefetch)
    shard, own = total // ranks, -(-sizes.trained // ranks)
    on_gpu, states_on_gpu = not zero.offload_parameters, not zero.offload_optimizer
    half = width < 4  # then fp32 values, and the fp32 gradient of one sub-group, are kept beside those of half width
    master, gradients = 4 * own * half, width * own + 4 * min(own, zero.sub_group) * half
    moments = given.states(own, 4)
    parts = {
        "base weights": shard * on_gpu + small + states,
        "reference model": (shard * on_gpu + small) * given.second_model,
        "adapters": total_adapters // ranks * on_gpu + small_adapters,
        "master weights": master * states_on_gpu,
        "gradients": gradients * states_on_gpu,
        "optimizer": moments * states_on_gpu,
        "communication": copies * min(total - small, window) + width * (zero.bucket + min(sizes.trained, zero.bucket)),
        "weight in full": one_in_full(sizes, given),
    }
    fresh, moved = 4 * adapter_values(sizes), ranks * copies * shard * (not on_gpu)
    host = moved + ranks * (total_adapters // ranks) * (not on_gpu)
    host += ranks * (master + gradients + moments) * (not states_on_gpu)
    if given.in_parts:
        load = load_in_parts(sizes, given, parts["base weights"], fresh, 2 * max(n * w for n, w in base))
        host = max(host, moved + ranks * fresh)
    elif given.bits:  # transformers skips zero.Init for quantised models (modeling_utils.py, get_init_context)
        load = load_whole(sizes, given, given.upcast)
    else:
        gathered = {"adapters": fresh, "transient": 2 * width * max(n for n, _ in base)}
        load = {"base weights": shard * on_gpu, "reference model": (copies - 1) * shard * on_gpu, **gathered}
    return EngineBytes(parts, load, host, 4 * own * states_on_gpu * (not given.fused))


def _bytes(elements: Iterable[tuple[int, int]]) -> int:
    return sum(number * width for number, width in elements)


def fsdp2(sizes: Sizes, given: PlanInput, offload: bool, one_rank_loads: bool) -> EngineBytes:
    """All in equal parts, but quantisation states, embeddings and head, and up to three decoder layers.

    Chunks of a 4-bit weight keep its whole states (bitsandbytes, Params4bit). What is in no decoder layer is whole
    from forward to backward. Whole are also the layer in use, the buffer it came from and the next one's
    (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, wait_for_unshard).

    Args:
        sizes: The model.
        given: How it is held.
        offload: Whether shards live on the host.
        one_rank_loads: ``cpu_ram_efficient_loading``; otherwise every rank reads the model.
    """
    ranks, width, copies, on_gpu = given.ranks, given.width, 1 + given.second_model, not offload
    linear, states = linear_bytes(sizes, given)
    base = linear + sum(sizes.other) * width
    root = (sum(sizes.other) - sizes.layers * sizes.layer_other) * width
    bare = linear * sizes.layer_linear // sum(sizes.linear) + sizes.layer_other * width
    layer = bare + sum(sizes.reference) * width // sizes.layers
    full = not sizes.policy
    held = 4 * sizes.trained if given.masters else base  # what is gathered from fp32 shards is of the other width
    trained = (held if full else 4 * sum(sizes.policy)) // ranks
    moments = given.states(sizes.trained // ranks, width if full and not given.masters else 4)
    parts = {
        "base weights": held // ranks * on_gpu + states,
        "reference model": base // ranks * on_gpu * given.second_model,
        "adapters": (4 * sum(sizes.policy) + width * sum(sizes.reference)) // ranks * on_gpu,
        "gradients": trained * on_gpu,
        "optimizer": moments * on_gpu,
        "communication": (copies + full) * root + (3 + 2 * full) * layer,
        "weight in full": one_in_full(sizes, given),
    }
    models = held + base * given.second_model
    kept = models + 4 * sum(sizes.policy) + width * sum(sizes.reference)
    host = kept + ranks * (trained + moments) if offload else 0
    if given.in_parts:
        fresh = 4 * adapter_values(sizes)
        transient = max(root, bare + fresh // sizes.layers)
        load = load_in_parts(sizes, given, parts["base weights"], fresh // ranks * on_gpu, transient)
        reading = base * offload + ranks * fresh
    elif given.bits:
        load, reading = load_whole(sizes, given, False), 0
        shards = (base + 4 * adapter_values(sizes)) // ranks * on_gpu  # beside the model: its state dict is held until
        load["transient"] = max(load["transient"], shards)  # all is sharded (accelerate/fsdp2.py, original_sd)
    else:
        largest = max(*sizes.linear, *sizes.other) * (4 if given.masters else width)
        load = {"base weights": models // ranks * on_gpu, "transient": max(2 * largest, root, layer)}
        reading = max(copies * base, held) * (1 if one_rank_loads else ranks)
    return EngineBytes(parts, load, max(host, reading), trained * on_gpu * (not given.fused))
