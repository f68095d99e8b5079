"""Small planning problems at random: clusters of up to 8 GPUs, models of up to 12 layers."""

from dataclasses import dataclass
from random import Random

from rankwright.cost_model.model_spec import Attention, FeedForward, Layer, LayerRun, ModelSpec
from rankwright.cost_model.workload import Objective, Workload
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.topology.cluster import Cluster, Link
from rankwright.topology.shorthand import parse_cluster

CLUSTERS = (
    *("1xl4", "2xrtx4090", "3xl40s", "4xa100-pcie", "5xl40s", "6xh100-sxm", "7xl4", "8xh100-sxm"),
    *("1xl40s+1xl4", "2xl40s+1xl4", "2xrtx4090+2xrtx3090", "3xl4+1xa100-pcie", "2xl4+3xl40s"),
    *("2x2xh100-sxm+ib400", "2x1xl40s+eth25", "2x3xa100-sxm+ib200", "1x4xh100-sxm+1x2xl40s+ib100"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One problem."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    memory_budget_bytes: int | None
    num_sharing: int = 1
    tp: int | None = None  # if pinned

    def search(self) -> Search:
        """Return the planner's search of it."""
        return Search(
            self.model,
            self.cluster,
            self.workload,
            self.memory_budget_bytes,
            Pins(tp=self.tp),
            num_sharing=self.num_sharing,
        )

    def describe(self) -> str:
        """Return the problem in one line."""
        load = self.workload
        limits = [
            f"{name} {limit * 1e3:.3g} ms"
            for name, limit in (("TTFT", load.ttft_limit_s), ("TPOT", load.tpot_limit_s))
            if limit is not None
        ]
        budget = self.memory_budget_bytes
        words = [
            f"{self.model.num_layers} layers of {self.model.name} on {self.cluster.describe()}",
            f"{load.input_tokens}+{load.output_tokens} tokens, concurrency {load.concurrency}",
            load.objective,
            *limits,
            "" if budget is None else f"{budget / 1e9:g} GB a GPU",
        ]
        return ", ".join(word for word in words if word)


def random_case(seed: int) -> Case:
    """Return the problem of number `seed`."""
    rng = Random(seed)
    cluster = _unequal_islands(rng, parse_cluster(rng.choice(CLUSTERS)))
    objectives: tuple[Objective, ...] = ("throughput", "throughput", "latency", "cost", "energy")
    objective = rng.choice(objectives)
    return Case(
        _random_model(rng, 12 if cluster.num_gpus <= 4 else 8),
        cluster,
        Workload(
            input_tokens=rng.choice((16, 200, 1000, 3000)),
            output_tokens=rng.choice((2, 30, 300)),
            concurrency=rng.choice((None, 1, 3, 8, 40)),
            ttft_limit_s=rng.choice((None, None, None, 0.05, 0.5)),
            tpot_limit_s=rng.choice((None, None, None, 0.004, 0.03)),
            objective=objective,
        ),
        rng.choice((None, None, 4, 8, 16)) and rng.choice((4, 6, 10, 16)) * 10**9,
    )


def _unequal_islands(rng: Random, cluster: Cluster) -> Cluster:
    """Return `cluster`, at times with NVLink between the first few GPUs of its first machine."""
    node = cluster.nodes[0]
    if len(node.gpus) < 3 or rng.random() < 0.5:
        return cluster
    joined = rng.randint(2, len(node.gpus) - 1)
    links = tuple(
        Link(a=link.a, b=link.b, kind="NV4", bytes_per_s=1e11, latency_s=1e-6)
        if max(link.a, link.b) < joined
        else Link(a=link.a, b=link.b, kind="SYS", bytes_per_s=1.6e10, latency_s=2e-6)
        for link in node.links
    )
    nodes = (node.model_copy(update={"links": links}), *cluster.nodes[1:])
    return cluster.model_copy(update={"nodes": nodes})


def _random_model(rng: Random, most_layers: int) -> ModelSpec:
    num_layers = rng.randint(1, most_layers)
    kv_heads, group = rng.choice(((1, 8), (2, 4), (3, 3), (4, 2), (8, 4)))
    attention = Attention(
        kind="gqa",
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=128,
        value_head_dim=128,
    )
    width = rng.choice((2048, 8192, 28672))
    dense = Layer(
        attention=attention, feed_forward=FeedForward(kind="dense", intermediate_size=width)
    )
    experts = FeedForward(
        kind="moe",
        intermediate_size=width // 4,
        num_experts=rng.choice((4, 6, 8)),
        experts_per_token=2,
        shared_intermediate_size=rng.choice((0, 1024)),
    )
    moe = Layer(attention=attention, feed_forward=experts)
    first = {"dense": num_layers, "moe": 0, "both": rng.randint(0, num_layers)}[
        rng.choice(("dense", "moe", "both"))
    ]
    runs = [LayerRun(count=first, layer=dense)] if first else []
    runs += [LayerRun(count=num_layers - first, layer=moe)] if first < num_layers else []
    return ModelSpec(
        name="a random model",
        family="llama",
        architecture="LlamaForCausalLM",
        hidden_size=rng.choice((1024, 4096, 8192)),
        vocab_size=rng.choice((32_000, 128_256)),
        layer_runs=tuple(runs),
        tie_embeddings=rng.random() < 0.3,
        max_context_tokens=100_000,
    )
