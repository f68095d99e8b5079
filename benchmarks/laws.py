"""What every prediction must obey, whatever its constants: the laws, and who breaks them.

Each law is a function that yields a line for everything that breaks it. `bench_laws.py` asks them
of many models, GPUs, splits and engines, `tests/cost_model/test_laws.py` of a few.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from rankwright.cost_model.dtypes import BITS
from rankwright.cost_model.engine_run import kv_capacity_tokens
from rankwright.cost_model.engines import ENGINE_ROWS
from rankwright.cost_model.memory import head_weight_bytes, layer_weight_bytes
from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.cost_model.parameters import layer_tensors
from rankwright.cost_model.predict import predict
from rankwright.cost_model.prediction import Prediction
from rankwright.cost_model.split import AttentionSplit, Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster, Node
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s

_ROUNDING = 1e-9
_SLACK = 1e-6
_LAST_CHUNK = 0.1
_WAITS = 0.03
_FEWER_GROUPS = 0.05
_FEW_TOKENS = 16
_SIMULATED = 0.01  # means of a run of some thousand requests of unequal lengths


@dataclass(frozen=True)
class Point:
    """One prediction to ask for.

    Args:
        model: What is served.
        cluster: Where, of one kind of GPU.
        degrees: `tp`, `pp`, `ep` and `dp` of the split; 1 where left out.
        attention: How ranks share attention.
        batch_size: Sequences of a replica at once.
        input_tokens: Of a prompt.
        output_tokens: Of an answer.
        engine: Whose constants.
    """

    model: ModelSpec
    cluster: Cluster
    degrees: tuple[tuple[str, int], ...] = ()
    attention: AttentionSplit = "tp"
    batch_size: int = 1
    input_tokens: int = 1024
    output_tokens: int = 128
    engine: str = "rankwright"

    @property
    def split(self) -> Split:
        """The split, its layers cut as evenly as they can be."""
        degrees = dict(self.degrees)
        pp, layers = degrees.get("pp", 1), self.model.num_layers
        stages = tuple(layers // pp + (stage < layers % pp) for stage in range(pp))
        return Split(
            tp=degrees.get("tp", 1),
            pp=pp,
            ep=degrees.get("ep", 1),
            dp=degrees.get("dp", 1),
            attention=self.attention,
            stage_layers=stages,
            max_batch_size=self.batch_size,
            micro_batches=min(pp, self.batch_size),
        )

    @property
    def is_simulated(self) -> bool:
        """Whether its figures are means of a simulated run: those of other engines are."""
        return self.engine in ENGINE_ROWS

    @property
    def all_run_at_once(self) -> bool:
        """Whether the cache has room for every request, so that none waits for another to end.

        Ours plans no batch that its cache has no room for. Other engines keep fewer in flight, and
        the fewer there are the sooner each has its next token: TPOT may then fall with the length
        of requests and rise with the room for them.
        """
        if not self.is_simulated:
            return True
        gpu = self.cluster.nodes[0].gpus[0]
        room = kv_capacity_tokens(self.model, self.split, gpu, self.engine)
        return self.batch_size * (self.input_tokens + self.output_tokens) <= room

    def predicted(self) -> Prediction:
        """Return the prediction."""
        load = Workload(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.batch_size * self.split.dp,
        )
        return predict(self.model, self.cluster, load, self.split, self.engine)

    def describe(self) -> str:
        """Return the point in one line."""
        return (
            f"{self.model.name} ({self.model.weight_dtypes.feed_forward}), "
            f"{self.cluster.describe()}, {self.split.label()}, {self.engine}, batch "
            f"{self.batch_size}, {self.input_tokens}+{self.output_tokens} tokens"
        )


def figures_are_sound(point: Point) -> Iterator[str]:
    """Finite, positive, inside their intervals, and the same when they are asked for again."""
    made = point.predicted()
    for name in ("ttft_s", "tpot_s", "output_tokens_per_s", "memory_bytes_per_gpu"):
        one = getattr(made, name)
        if not all(isfinite(figure) and figure > 0 for figure in (one.low, one.value, one.high)):
            yield f"{point.describe()}: {name} is {one}, expected finite and more than 0"
        if not one.low <= one.value <= one.high:
            yield f"{point.describe()}: {name} {one} lies outside its interval"
    for part in (*made.decode_parts, *made.prefill_parts):
        if not all(map(isfinite, (part.seconds, part.flops, part.bytes))):
            yield f"{point.describe()}: {part.name} is not finite"
    if made != point.predicted():
        yield f"{point.describe()}: asked again, the prediction is another"


def hardware_is_not_exceeded(point: Point) -> Iterator[str]:
    """A token takes no less than reading its weights once; no GPU does more than its peak."""
    made, split, model = point.predicted(), point.split, point.model
    gpu = point.cluster.nodes[0].gpus[0]
    ranks = split.tp * split.cp
    weights_s = active_weight_bytes(model) / split.tp / memory_bytes_per_s(gpu)
    if made.tpot_s.value < weights_s * (1 - _ROUNDING):
        yield f"{point.describe()}: TPOT {made.tpot_s.value:.4g} s, reading weights {weights_s:.4g}"
    peak = max(flops_per_s(gpu, "bfloat16"), flops_per_s(gpu, "float16"))
    if model.weight_dtypes.feed_forward in ("float8", "mxfp4"):
        peak = max(peak, flops_per_s(gpu, "float8"))
    token_flops = 2 * active_parameters(model)
    prompt_s = token_flops * point.input_tokens / (ranks * split.pp * peak)
    if made.ttft_s.value < prompt_s * (1 - _ROUNDING):
        yield f"{point.describe()}: TTFT {made.ttft_s.value:.4g} s, arithmetic {prompt_s:.4g} s"
    a_request = token_flops * (point.input_tokens + point.output_tokens - 1)
    done = made.output_tokens_per_s.value / point.output_tokens * a_request
    if done > split.num_gpus * peak * (1 + _ROUNDING):
        yield f"{point.describe()}: {done:.4g} FLOP/s, peak {split.num_gpus * peak:.4g}"


def more_work_takes_longer(
    point: Point, batches: Sequence[int], contexts: Sequence[int]
) -> Iterator[str]:
    """TPOT and memory grow with batch and context, TTFT with the prompt.

    Asked of points whose requests all run at once. Where prompts fill the steps, TPOT is the time
    of a full one: a longer prompt may fill its last chunk less and leave room for fewer that
    decode, so that it may fall by some percent, and so may the wait for others' prompts, by less.
    """
    by_batch = [replace(point, batch_size=batch) for batch in batches]
    by_batch = [one for one in by_batch if one.all_run_at_once]
    yield from _falls(by_batch, ("memory_bytes_per_gpu",), _SLACK)
    # Few tokens wait for others' prompts as the run has it, not as the lengths have it.
    has_tpot = not point.is_simulated or point.output_tokens >= _FEW_TOKENS
    if has_tpot:
        yield from _falls(by_batch, ("tpot_s",), _slack_of_batches(point))
    by_context = [replace(point, input_tokens=tokens) for tokens in contexts]
    by_context = [one for one in by_context if one.all_run_at_once]
    yield from _falls(by_context, ("memory_bytes_per_gpu",), _SLACK)
    yield from _falls(by_context, ("ttft_s",), _SLACK if point.batch_size == 1 else _WAITS)
    if has_tpot:
        yield from _falls(by_context, ("tpot_s",), _LAST_CHUNK)


def _slack_of_batches(point: Point) -> float:
    """Return by what share TPOT may fall with the batch.

    Our executor expands latents in fewer kernels the more prompt tokens a step has.
    """
    if point.is_simulated:
        return _SIMULATED
    has_latents = point.model.layers[0].attention.kind == "mla"
    return _FEWER_GROUPS if has_latents else _SLACK


def faster_is_not_slower(point: Point, factor: float = 1.5) -> Iterator[str]:
    """A GPU that is `factor` times as fast in arithmetic or memory takes no longer."""
    yield from _rises([point, replace(point, cluster=faster(point.cluster, factor, 1.0))])
    yield from _rises([point, replace(point, cluster=faster(point.cluster, 1.0, factor))])


def halves_compute_no_slower(point: Point) -> Iterator[str]:
    """Two GPUs compute no longer than one, and hold no more each.

    Sums over the two are left aside, and what the host takes to launch them.
    """
    wide = replace(point, degrees=(*point.degrees, ("tp", 2)))
    one, two = point.predicted(), wide.predicted()
    for name in ("decode_parts", "prefill_parts"):
        alone, shared = (
            sum(part.seconds for part in getattr(made, name) if part.name not in _NOT_COMPUTED)
            for made in (one, two)
        )
        if shared > alone * (1 + _SLACK):
            yield f"{wide.describe()}: {name} compute {shared:.4g} s, on one GPU {alone:.4g} s"
    if two.memory_bytes_per_gpu.value > one.memory_bytes_per_gpu.value * 1.02:
        yield f"{wide.describe()}: a GPU holds more than with one GPU"


def shorter_weights_are_not_slower(point: Point, short: ModelSpec) -> Iterator[str]:
    """Weights of fewer bits, on a GPU that multiplies them, take no longer."""
    if point.all_run_at_once:  # else they leave room for more at once
        yield from _rises([point, replace(point, model=short)])


def active_parameters(model: ModelSpec) -> float:
    """Return the weights that each token is multiplied with in the layers."""
    return sum(_active(layer, model) for layer in model.layers)


def active_weight_bytes(model: ModelSpec) -> float:
    """Return the bytes that a step reads at least: of experts only as many as a token chooses."""
    total = float(head_weight_bytes(model, tp=1))
    for layer in model.layers:
        block = layer.feed_forward
        size = float(layer_weight_bytes(model, layer, tp=1, ep=1, attention="tp"))
        if block.kind == "moe":
            experts = 3 * model.hidden_size * block.intermediate_size * block.num_experts
            stored = experts * BITS[model.weight_dtypes.feed_forward] / 8
            size -= stored * (1 - block.experts_per_token / block.num_experts)
        total += size
    return total


def _active(layer: Layer, model: ModelSpec) -> float:
    tensors = layer_tensors(layer, model.hidden_size, tp=1, ep=1, attention="tp")
    block = layer.feed_forward
    share = block.experts_per_token / block.num_experts if block.kind == "moe" else 1.0
    return sum(
        tensor.size * (share if tensor.name.startswith("expert") else 1.0)
        for tensor in tensors
        if tensor.rows > 1
    )


def faster(cluster: Cluster, flops: float, memory: float) -> Cluster:
    """Return `cluster` with GPUs that are so many times as fast in arithmetic and in memory."""
    nodes: list[Node] = []
    for node in cluster.nodes:
        gpus = tuple(
            gpu.model_copy(
                update={
                    "memory_bytes_per_s": memory * memory_bytes_per_s(gpu),
                    "flops_per_s": {name: flops * flops_per_s(gpu, name) for name in _DTYPES},
                }
            )
            for gpu in node.gpus
        )
        nodes.append(node.model_copy(update={"gpus": gpus}))
    return cluster.model_copy(update={"nodes": tuple(nodes)})


_DTYPES = ("float32", "float16", "bfloat16", "float8")
_NOT_COMPUTED = ("all-reduce", "all-gather and reduce-scatter", "logits gather", "launches")
_TIMES = ("ttft_s", "tpot_s")


def _falls(points: Sequence[Point], names: Sequence[str], slack: float) -> Iterator[str]:
    """Yield where a figure is smaller at a later point, by more than a share of `slack`."""
    made = [point.predicted() for point in points]
    for before, after, point in zip(made, made[1:], points[1:], strict=False):
        for name in names:
            less, more = getattr(before, name).value, getattr(after, name).value
            if more < less * (1 - slack):
                yield f"{point.describe()}: {name} {more:.6g}, with less to do {less:.6g}"


def _rises(points: Sequence[Point]) -> Iterator[str]:
    """Yield where the second of two takes longer."""
    slow, fast = (point.predicted() for point in points)
    slack = _SIMULATED if points[0].is_simulated else _SLACK
    for name in _TIMES:
        before, after = getattr(slow, name).value, getattr(fast, name).value
        if after > before * (1 + slack):
            yield f"{points[1].describe()}: {name} {after:.6g}, with slower parts {before:.6g}"
