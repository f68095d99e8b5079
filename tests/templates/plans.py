"""Plans built directly from the value types, so that rendering is tested without a planner."""

from collections.abc import Sequence

from rankwright.cost_model.model_spec import Attention, FeedForward, Layer, LayerRun, ModelSpec
from rankwright.cost_model.prediction import Estimate, Prediction
from rankwright.cost_model.shards import column_range, head_ranges
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.plan import (
    Certificate,
    EnvironmentVariable,
    KvCachePlan,
    Limits,
    Plan,
    RankPlan,
)
from rankwright.topology.cluster import Cluster, Fabric, Gpu, Node

GIB = 2**30
NCCL = (
    EnvironmentVariable(name="NCCL_DEBUG", value="WARN", reason="a failing link must leave a line"),
    EnvironmentVariable(name="NCCL_IB_HCA", value="=mlx5_0,mlx5_1", reason="ports of this node"),
    EnvironmentVariable(name="NCCL_SOCKET_IFNAME", value="=eth0", reason="the routed interface"),
)


def spec(name: str = "meta-llama/Llama-3.1-405B", num_layers: int = 126) -> ModelSpec:
    attention = Attention(
        kind="gqa", num_heads=128, num_kv_heads=8, head_dim=128, value_head_dim=128
    )
    layer = Layer(
        attention=attention, feed_forward=FeedForward(kind="dense", intermediate_size=53248)
    )
    return ModelSpec(
        name=name,
        family="llama",
        architecture="LlamaForCausalLM",
        hidden_size=16384,
        vocab_size=128256,
        layer_runs=(LayerRun(count=num_layers, layer=layer),),
        max_context_tokens=131072,
    )


def cluster(gpus_of_nodes: Sequence[int], device: str = "h100-sxm", num_cpus: int = 1) -> Cluster:
    nodes = tuple(
        Node(
            name=f"node{index}",
            num_cpus=num_cpus,
            gpus=tuple(
                Gpu(
                    index=gpu,
                    device=device,
                    name=device,
                    memory_bytes=80 * GIB,
                    total_memory_bytes=80 * GIB,
                )
                for gpu in range(count)
            ),
        )
        for index, count in enumerate(gpus_of_nodes)
    )
    fabric = Fabric(kind="infiniband", bytes_per_s=50e9, ports_per_node=8, latency_s=5e-6)
    return Cluster(nodes=nodes, fabric=fabric if len(nodes) > 1 else None, source="test")


def plan(
    ranks_of_nodes: Sequence[int] = (8, 8),
    *,
    tp: int = 8,
    pp: int = 2,
    machines: Cluster | None = None,
    model: ModelSpec | None = None,
    environment: tuple[EnvironmentVariable, ...] = NCCL,
    memory_bytes_per_gpu: float = 72 * GIB,
) -> Plan:
    """A plan with `ranks_of_nodes[i]` ranks on machine `i`; none where it is 0."""
    model = model or spec()
    machines = machines or cluster([max(count, 1) for count in ranks_of_nodes])
    places = [(node, gpu) for node, count in enumerate(ranks_of_nodes) for gpu in range(count)]
    dp, rest = divmod(len(places), tp * pp)
    assert rest == 0, f"{len(places)} ranks are no multiple of tp={tp} x pp={pp}"
    attention, ffn = model.layers[0].attention, model.layers[0].feed_forward
    layers_each, more = divmod(model.num_layers, pp)
    stage_layers = tuple(layers_each + (stage < more) for stage in range(pp))
    ranks = []
    for rank, (node, gpu) in enumerate(places):
        replica, place = divmod(rank, tp * pp)
        stage, tp_rank = divmod(place, tp)
        first = sum(stage_layers[:stage])

        ranks.append(
            RankPlan(
                rank=rank,
                node=node,
                gpu=gpu,
                replica=replica,
                stage=stage,
                tp_rank=tp_rank,
                layers=(first, first + stage_layers[stage]),
                query_heads=head_ranges(attention, tp, tp_rank)[0],
                kv_heads=(0, attention.num_kv_heads),
                ffn_columns=column_range(ffn.intermediate_size, tp, tp_rank),
                vocab=column_range(model.vocab_size, tp, tp_rank),
            )
        )
    memory = Estimate(
        value=memory_bytes_per_gpu, low=memory_bytes_per_gpu * 0.9, high=memory_bytes_per_gpu
    )
    return Plan(
        num_gpus=len(places),
        model=model,
        workload=Workload(),
        cluster=machines,
        cluster_fingerprint=machines.fingerprint,
        split=Split(tp=tp, pp=pp, dp=dp, stage_layers=stage_layers),
        ranks=tuple(ranks),
        kv_cache=KvCachePlan(num_blocks=1000),
        limits=Limits(max_num_seqs=64, max_batched_tokens=2048, max_model_len=8192),
        prediction=Prediction(
            ttft_s=Estimate(value=0.5, low=0.4, high=0.7),
            tpot_s=Estimate(value=0.03, low=0.02, high=0.04),
            output_tokens_per_s=Estimate(value=1000, low=800, high=1200),
            memory_bytes_per_gpu=memory,
            batch_size=64,
        ),
        certificate=Certificate(
            objective="output tokens/s",
            objective_value=1000,
            bound=1000,
            gap=0,
            solver="none",
            status="optimal",
            solve_s=0,
            num_candidates=1,
            binding_constraint="memory",
        ),
        environment=environment,
    )


def moe_spec(num_layers: int = 61, dense_layers: int = 3) -> ModelSpec:
    """A DeepSeek-like model: dense layers first, then 256 experts of which 8 are used."""
    made = spec("deepseek-ai/DeepSeek-V3", num_layers)
    (run,) = made.layer_runs
    experts = FeedForward(kind="moe", intermediate_size=2048, num_experts=256, experts_per_token=8)
    layer = run.layer.model_copy(update={"feed_forward": experts})
    runs: tuple[LayerRun, ...] = (LayerRun(count=num_layers - dense_layers, layer=layer),)
    if dense_layers:
        runs = (LayerRun(count=dense_layers, layer=run.layer), *runs)
    return made.model_copy(update={"layer_runs": runs})


def mixed_plan() -> Plan:
    """Two replicas, each on a node of its own kind of GPU."""
    h100, a100 = cluster((8, 8)).nodes
    slower = tuple(
        gpu.model_copy(update={"device": "a100-sxm-80gb", "name": "a100"}) for gpu in a100.gpus
    )
    nodes = (h100, a100.model_copy(update={"gpus": slower}))
    fabric = Fabric(kind="infiniband", bytes_per_s=50e9, ports_per_node=8, latency_s=5e-6)
    return plan(tp=8, pp=1, machines=Cluster(nodes=nodes, fabric=fabric, source="test"))


def with_split(made: Plan, **changes: object) -> Plan:
    """`made` with other degrees of the same number of GPUs, such as ep or attention."""
    return made.model_copy(update={"split": made.split.model_copy(update=changes)})


def cpu_plan(ranks_of_nodes: Sequence[int] = (2, 2), num_cpus: int = 4) -> Plan:
    """TP1: each rank a replica of its own, so that any number of ranks is legal."""
    return plan(
        ranks_of_nodes,
        tp=1,
        pp=1,
        machines=cluster([max(count, 1) for count in ranks_of_nodes], "cpu", num_cpus),
        model=spec("HuggingFaceTB/SmolLM2-135M-Instruct", 30),
        environment=(),
        memory_bytes_per_gpu=2 * GIB,
    )
