"""How far measurements lie from predictions: factors that hold about 80 % of them.

By where the constants come from, and for other engines by engine. `benchmarks/bench_accuracy.py`
counts how many published measurements lie inside, on workloads that no constant was fitted to;
`benchmarks/fit_calibrations.py` does the same for kernels.
"""

from dataclasses import dataclass

from rankwright.cost_model.efficiency import Provenance
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.prediction import Estimate
from rankwright.topology.cluster import Gpu

Factors = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Intervals:
    """Measured over predicted: the tenth and the ninetieth of a hundred.

    Args:
        tpot: Of the time per output token.
        rate: Of tokens a second.
        prompt: Of the part of TTFT in which the prompt is computed; of all of it where it comes
            from a simulated run.
        wait: Of the part of TTFT that is waiting.
    """

    tpot: Factors
    rate: Factors
    prompt: Factors
    wait: Factors


# Ours. Analytic constants scored on 600 published points of other engines before any fit: 80 % of
# measured TPOT within 0.78 to 1.31 of the predicted. Measured tables: 80 % of held-back kernels of
# an H100 or H200 lie within; a
# calibration of this very machine leaves what shapes differ in.
OURS: dict[Provenance, Intervals] = {
    "analytic": Intervals((0.78, 1.31), (0.76, 1.28), (0.8, 1.5), (0.5, 6.0)),
    "measured table": Intervals((0.87, 1.15), (0.86, 1.15), (0.87, 1.25), (0.5, 6.0)),
    "measured here": Intervals((0.90, 1.12), (0.89, 1.12), (0.90, 1.2), (0.5, 6.0)),
}
# Order statistics of measured / predicted of the published runs that are not held back, as
# `benchmarks/bench_accuracy.py` prints them (split conformal prediction). They hold 80 % of TPOT,
# and of TTFT, of the held-back runs; by engine 60 to 93 %.
_RATE = (0.82, 1.18)  # of TensorRT-LLM's maximum throughput; of others no table is published
ENGINES: dict[str, Intervals] = {
    "vllm": Intervals((0.947, 1.133), _RATE, (0.637, 1.101), (0.637, 1.101)),
    "sglang": Intervals((0.954, 1.022), _RATE, (0.812, 1.284), (0.812, 1.284)),
    "sglang-mixed": Intervals((0.853, 1.297), _RATE, (0.53, 4.53), (0.53, 4.53)),
    "trtllm": Intervals((0.874, 1.129), _RATE, (0.691, 1.926), (0.691, 1.926)),
}
# Of other engines where no constant was fitted, experts and other GPUs: order statistics of the
# rows of `benchmarks/bench_public.py` (31 of TPOT, 57 of throughput; of TTFT five, so that its
# factors are a guess). Those of one half of the sources held 45 to 96 % of the other half.
BEYOND = Intervals((0.93, 1.73), (0.70, 1.16), (0.8, 2.8), (0.8, 2.8))
_MEASURED_GPUS = ("a100-sxm-80gb", "h100-sxm", "h200-sxm")
# Of prompts whose kernels the host launches more slowly than the GPU runs them: hosts differ, and
# share their time with others. They hold 19 of the 23 recorded ones (0.74 to 6.2).
LAUNCHED: Factors = (0.8, 2.0)
# Weights and KV cache are exact, the rest is a bound.
MEMORY: Factors = (0.95, 1.05)


def intervals_of(engine: str, provenance: Provenance) -> Intervals:
    """Return the factors for a prediction of `engine`."""
    return ENGINES.get(engine, OURS[provenance])


def engine_intervals(engine: str, spec: ModelSpec, gpu: Gpu) -> Intervals:
    """Return the factors of `engine`, wider for what its published runs do not have.

    Those are experts, and GPUs of other kinds.
    """
    has_experts = any(run.layer.feed_forward.kind == "moe" for run in spec.layer_runs)
    return BEYOND if has_experts or gpu.device not in _MEASURED_GPUS else ENGINES[engine]


def estimate(value: float, factors: Factors) -> Estimate:
    """Return the value with its interval."""
    return Estimate(value=value, low=value * factors[0], high=value * factors[1])
