"""What a plan asks of the kernels, the GPUs and the KV cache, checked before anything is loaded.

The launcher asks `check_start`, from the plan alone and without PyTorch. Each rank asks
`check_device` of the GPU that it got, which may be on a machine that the launcher never saw.
"""

from collections.abc import Iterable
from importlib.util import find_spec

from rankwright.executor.backends.tools import MissingToolError
from rankwright.executor.run_options import WORKER, RunOptions
from rankwright.kernels.limits import (
    LARGEST_LATENT,
    LARGEST_LATENT_ROTARY,
    LEAST_BLOCK_TOKENS,
    LEAST_CAPABILITY,
    blocks_are_legal,
    padded_head_dim,
)
from rankwright.planner.plan import Plan
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import device_of
from rankwright.topology.link_kinds import is_direct

Capability = tuple[int, int]


def check_start(plan: Plan, options: RunOptions) -> tuple[str, ...]:
    """Return what the user should be told of a plan that will run, a line each.

    Raises:
        ValueError: Its KV cache, a head size or a dtype cannot be run.
        MissingToolError: Triton is not installed where GPUs need it.
    """
    _check_cache(plan)
    gpus = _gpus(plan, options.device)
    if not gpus:
        return ()
    _check_heads(plan)
    # Ranks under torchrun have this Python; those of Ray have their nodes', and look there.
    if options.backend == "local" and tuple(options.worker) == WORKER:
        check_triton()
    notes = [
        check_capability(plan.model.dtype, capability, gpu.name)
        for gpu in gpus
        if (capability := _capability(gpu)) is not None
    ]
    notes.append(_slow_links(plan))
    return tuple(dict.fromkeys(note for note in notes if note is not None))


def check_triton() -> None:
    """Check that Triton can be imported.

    Raises:
        MissingToolError: It cannot. Plain PyTorch, which the tests compare with, reads lengths
            back from the GPU at every step, which CUDA graphs do not allow: no way to serve.
    """
    if find_spec("triton") is None:
        raise MissingToolError(
            "Triton is not installed here, and the kernels on GPUs are written in it; "
            "pip install 'rankwright[executor]' on Linux, or launch with --device cpu"
        )


def check_capability(dtype: str, capability: Capability, name: str) -> str | None:
    """Return a warning about a GPU of this compute capability, None where there is none.

    Args:
        dtype: That the plan computes in.
        capability: Major and minor version, as CUDA counts them.
        name: Of the GPU.

    Raises:
        ValueError: It has no bfloat16, and the plan wants it.
    """
    if capability >= LEAST_CAPABILITY:
        return None
    found = ".".join(map(str, capability))
    least = ".".join(map(str, LEAST_CAPABILITY))
    if dtype == "bfloat16":
        raise ValueError(
            f"{name} (compute capability {found}) does not compute in bfloat16, which GPUs from "
            f"{least} do; plan again with --dtype float16"
        )
    return (
        f"{name} has compute capability {found}, and Triton promises to support {least} and "
        "above: kernels may fail to compile there"
    )


def _check_cache(plan: Plan) -> None:
    cache, longest = plan.kv_cache, plan.limits.max_model_len
    if not blocks_are_legal(cache.block_tokens):
        raise ValueError(
            f"kv_cache.block_tokens is {cache.block_tokens}; the attention kernels take a power of "
            f"two from {LEAST_BLOCK_TOKENS}"
        )
    each = cache.block_tokens * plan.split.cp
    room, needed = cache.num_blocks * each, -(-longest // each)
    if room < longest:
        ranks = f" on each of {plan.split.cp} ranks" if plan.split.cp > 1 else ""
        raise ValueError(
            f"the KV cache cannot hold one request: {cache.num_blocks} blocks of "
            f"{cache.block_tokens} tokens{ranks} are {room} tokens, and limits.max_model_len is "
            f"{longest}; set kv_cache.num_blocks to {needed} or more, or limits.max_model_len to "
            f"{room} or less"
        )


def _check_heads(plan: Plan) -> None:
    """Check the head sizes of all layers against what the kernels on GPUs take."""
    for number, layer in enumerate(plan.model.layers):
        attention = layer.attention
        where = f"the executor cannot run {plan.model.name!r} on GPUs: layer {number} has"
        remedy = "launch with --device cpu, or render for another engine (`rankwright render`)"
        if attention.kv_lora_rank is None:
            try:
                padded_head_dim(attention.head_dim)
            except ValueError as error:
                raise ValueError(f"{where} {error}; {remedy}") from None
            continue
        latent, rotary = attention.kv_lora_rank, attention.rope_head_dim or 0
        if latent > LARGEST_LATENT or rotary > LARGEST_LATENT_ROTARY:
            raise ValueError(
                f"{where} latents of {latent} and {rotary} rotary columns; its kernel takes up to "
                f"{LARGEST_LATENT} and {LARGEST_LATENT_ROTARY}; {remedy}"
            )


def _slow_links(plan: Plan) -> str | None:
    """Return a warning where ranks that sum every layer have PCIe between them, else None."""
    groups: dict[tuple[int, int, int, int], set[int]] = {}
    for rank in plan.ranks:
        key = (rank.replica, rank.stage, rank.cp_rank, rank.node)
        groups.setdefault(key, set()).add(rank.gpu)
    for (*_, node), gpus in groups.items():
        for link in plan.cluster.node(node).links:
            if {link.a, link.b} <= gpus and not is_direct(link.kind):
                return (
                    f"GPUs {link.a} and {link.b} of node {node} share every layer without NVLink "
                    f"between them ({link.kind}, {link.bytes_per_s / 1e9:.0f} GB/s each way): sums "
                    "go over PCIe, as the plan has counted"
                )
    return None


def _gpus(plan: Plan, device: str) -> list[Gpu]:
    """Return the GPUs that ranks compute on; none where they run on CPUs."""
    if device == "cpu":
        return []
    places: Iterable[tuple[int, int]] = ((rank.node, rank.gpu) for rank in plan.ranks)
    found = [
        next(gpu for gpu in plan.cluster.node(node).gpus if gpu.index == index)
        for node, index in places
    ]
    return [gpu for gpu in found if gpu.device != "cpu"]


def _capability(gpu: Gpu) -> Capability | None:
    """Return the compute capability, probed or from the table; None: not CUDA, or unknown."""
    if gpu.compute_capability is not None:
        return gpu.compute_capability
    device = device_of(gpu)
    return None if device is None else device.compute_capability
