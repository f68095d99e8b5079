"""What the ranks of a test of shared GPU memory run."""

import torch
import torch.distributed as dist

from rankwright.cost_model.peer_sums import PeerSums, SumAlgorithm
from rankwright.executor.expert_memory import ExpertMemory
from rankwright.executor.peer_memory import PeerMemory, open_peer_memory
from rankwright.kernels.rms_norm import rms_norm

EPS = 1e-5
_TABLES = {
    "two_shot": PeerSums(two_shot_bytes=1 << 30),
    "pushed": PeerSums(pushed_bytes=1 << 30, one_shot_bytes=1 << 30),
}


def opened(max_rows: int, dim: int, dtype: torch.dtype, algorithm: SumAlgorithm) -> PeerMemory:
    device = torch.device("cuda", dist.get_rank())
    memory = open_peer_memory(
        dist.group.WORLD,
        one_machine=True,
        max_rows=max_rows,
        dim=dim,
        dtype=dtype,
        device=device,
        table=_TABLES.get(algorithm),
    )
    assert memory is not None
    return memory


def sums(
    rank: int, rows: int, dim: int, dtype: torch.dtype, repeats: int, algorithm: SumAlgorithm
) -> list[float]:
    """Relative errors against NCCL's float32 sums, over repeats with ranks that lag in turn."""
    device = torch.device("cuda", rank)
    memory = opened(rows, dim, dtype, algorithm)
    generator = torch.Generator(device).manual_seed(rank)
    errors = []
    for repeat in range(repeats):
        if repeat % 3 == 0:
            memory.begin()
        if repeat % dist.get_world_size() == rank:
            torch.cuda._sleep(200_000)
        x = torch.randn(rows, dim, generator=generator, device=device).to(dtype)
        part = memory.part(rows, dim, dtype)
        assert part is not None
        if repeat % 2:
            part.copy_(x)
        total = memory.sum(part if repeat % 2 else x)
        assert total is not None
        exact = x.float()
        dist.all_reduce(exact)
        errors.append(float((total.float() - exact).norm() / exact.norm()))
    assert memory.part(rows + 1, dim, dtype) is None
    return errors


def graph(
    rank: int, rows: int, dim: int, num_sums: int, replays: int, algorithm: SumAlgorithm
) -> tuple[float, bool]:
    """Worst relative error of a chain of add-and-norm replayed from a graph, and equality.

    Each replay starts from new numbers; the chain is computed again in float32 with NCCL. Of other
    forms, every third sum is one shot, as where sums of two sizes follow each other.
    """
    device = torch.device("cuda", rank)
    dtype = torch.bfloat16
    memory = opened(rows, dim, dtype, algorithm)
    generator = torch.Generator(device).manual_seed(7)  # equal on all ranks
    weight = torch.rand(dim, generator=generator, device=device).to(dtype) + 0.5
    x = torch.zeros(rows, dim, device=device, dtype=dtype)
    residual = torch.zeros_like(x)

    def chain() -> torch.Tensor:
        memory.begin()
        out = x
        for step in range(num_sums):
            part = memory.part(rows, dim, dtype)
            assert part is not None
            torch.mul(out, rank + 1 + step % 2, out=part)
            form: SumAlgorithm = "one_shot" if step % 3 == 2 else algorithm
            normed = memory.sum(
                part, weight_D=weight, eps=EPS, residual_TD=residual, algorithm=form
            )
            assert normed is not None
            out = normed
        return out

    chain()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = chain()
    worst, equal = 0.0, True
    for replay in range(replays):
        x.copy_(torch.randn(rows, dim, generator=generator, device=device))
        residual.copy_(torch.randn(rows, dim, generator=generator, device=device))
        expected, total = x.clone(), residual.clone()
        if replay % dist.get_world_size() == rank:
            torch.cuda._sleep(100_000)
        captured.replay()
        for step in range(num_sums):
            factor = sum(other + 1 + step % 2 for other in range(dist.get_world_size()))
            summed = (expected.float() * factor).to(dtype)
            expected = rms_norm(summed, weight, EPS, total, backend="reference")
        worst = max(worst, float((out.float() - expected.float()).norm() / expected.float().norm()))
        everyone = [torch.empty_like(out) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, out)
        equal &= all(torch.equal(other, out) for other in everyone)
    return worst, equal


def exchanges(rank: int, num_tokens: int, moe_tp: int, repeats: int, in_graph: bool) -> list[float]:
    """Relative errors of tokens that went to their experts and back, over repeats.

    Slot `s` makes `(s + 1) / moe_tp` times a token on each rank that has a part of it. Ranks lag in
    turn.
    """
    device, dtype = torch.device("cuda", rank), torch.bfloat16
    ranks, top_k, dim, held = dist.get_world_size(), 4, 2048, 3
    group = dist.group.WORLD
    assert group is not None
    memory = ExpertMemory(group, top_k=top_k, dim=dim, dtype=dtype, moe_tp=moe_tp, device=device)
    ep, first = ranks // moe_tp, rank // moe_tp * held
    starts = torch.arange(ep + 1, dtype=torch.int32, device=device) * held
    x = torch.zeros(num_tokens, dim, device=device, dtype=dtype)
    weights = torch.zeros(num_tokens, top_k, device=device)
    slots = torch.zeros(num_tokens, top_k, device=device, dtype=torch.int32)

    def trip() -> torch.Tensor:
        rows, weights_here, slots_here = memory.dispatch(x, weights, slots, starts)
        factor = weights_here * (slots_here + first + 1) * (slots_here >= 0)
        made = rows.float() * factor.sum(1, keepdim=True) / moe_tp
        # Rows that did not come may hold anything.
        came = (slots_here >= 0).any(1, keepdim=True)
        memory.parts(len(rows)).copy_(torch.where(came, made, float("nan")))
        return memory.combine(slots, starts, x)

    trip()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    if in_graph:
        with torch.cuda.graph(captured):
            out = trip()
    generator = torch.Generator(device).manual_seed(rank)
    errors = []
    for repeat in range(repeats):
        x.copy_(torch.randn(x.shape, generator=generator, device=device))
        weights.copy_(torch.rand(weights.shape, generator=generator, device=device))
        order = torch.rand(num_tokens, ep * held, generator=generator, device=device).argsort(1)
        chosen = min(top_k, ep * held)
        slots.fill_(-1)[:, :chosen] = order[:, :chosen].to(torch.int32)
        if repeat % ranks == rank:
            torch.cuda._sleep(200_000)
        if in_graph:
            captured.replay()
        else:
            out = trip()
        factor = (weights * (slots + 1)).sum(1, keepdim=True)
        expected = x.float() * (1 + factor)
        errors.append(float((out.float() - expected).norm() / expected.norm()))
    return errors
