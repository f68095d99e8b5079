"""Options that several commands share, and the values they stand for."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from rankwright.cost_model.calibration_file import own_file
from rankwright.cost_model.dtypes import BITS, Dtype
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.split import AttentionSplit, CpExchange
from rankwright.cost_model.workload import MOST_REQUESTS, MOST_TOKENS, Objective, Workload
from rankwright.topology import cluster as topology

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local Hugging Face folder or config.json.",
        show_default=False,
    ),
]
ModelOrPlan = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|PLAN",
        help="A plan.json, or a model, which is planned first.",
        show_default=False,
    ),
]
Cluster = Annotated[
    str,
    typer.Option(
        help="auto (probe this machine), a shorthand such as 2x8xh100-sxm+ib400, or a file."
    ),
]
InputTokens = Annotated[
    int, typer.Option("--isl", min=1, metavar="N", help="Prompt length, tokens.")
]
OutputTokens = Annotated[
    int, typer.Option("--osl", min=1, metavar="N", help="Tokens generated a request.")
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Requests in flight at most.  [default: what memory holds]"
    ),
]
Rate = Annotated[float | None, typer.Option(help="Requests a second, instead of --concurrency.")]
Ttft = Annotated[
    float | None, typer.Option("--ttft", metavar="MS", help="Limit of the time to first token.")
]
Tpot = Annotated[
    float | None,
    typer.Option("--tpot", metavar="MS", help="Limit of the time per output token."),
]
Percentile = Annotated[float, typer.Option(help="Percentile at which the limits hold.")]
ObjectiveOption = Annotated[Objective, typer.Option(help="What to optimise.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Weights, instead of the checkpoint's format.")
]
KvDtype = Annotated[Dtype | None, typer.Option(help="KV cache, instead of the weights' format.")]
MemoryBudget = Annotated[
    float | None, typer.Option(metavar="GB", help="Memory of each GPU that may be used.")
]
Tp = Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix the tensor-parallel size.")]
Pp = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Fix the number of pipeline stages.")
]
Ep = Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix the expert-parallel size.")]
Dp = Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix the number of replicas.")]
Cp = Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix the context-parallel size.")]
AttentionOption = Annotated[
    AttentionSplit | None,
    typer.Option(help="Fix how a stage's ranks share attention: by heads (tp) or requests (dp)."),
]
CpExchangeOption = Annotated[
    CpExchange | None,
    typer.Option(help="Fix how context-parallel ranks get each other's keys and values."),
]
MixedShapes = Annotated[
    Literal["auto", "never"],
    typer.Option(
        help="auto: replicas of unlike shapes on one machine where they serve over 5 % more; not "
        "with pins, --rate, --trace, --pareto or --report."
    ),
]
EngineOption = Annotated[
    Literal["rankwright", "vllm", "sglang", "sglang-mixed", "trtllm"],
    typer.Option(help="Engine that will run it: its forms are legal, its speed is predicted."),
]

Backend = Annotated[Literal["auto", "local", "ray"], typer.Option(help="How ranks are started.")]
LaunchBackend = Annotated[
    Literal["auto", "local", "ray", "slurm", "kubernetes"],
    typer.Option(
        help="What starts the ranks, or what the launch is submitted to.  [default: ray for a plan "
        "of several machines, else local]",
        show_default=False,
    ),
]
LoadFormat = Annotated[
    Literal["auto", "dummy"],
    typer.Option(help="Weights from the checkpoint, or random ones for benchmarks."),
]
ModelPath = Annotated[
    Path | None,
    typer.Option(help="Folder with the weights.  [default: MODEL, or the hub's cache]"),
]
StartTimeout = Annotated[
    float, typer.Option(metavar="S", help="Until every replica must be ready.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Run PLAN where the machine differs from its cluster.")
]

CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What `rankwright calibrate` measured.  [default: its table for these GPUs, where "
        "there is one]",
    ),
]


def calibrated(cluster: topology.Cluster, path: Path | None) -> topology.Cluster:
    """Return the cluster with what a calibration of its GPUs measured: `path`, or the user's own.

    Raises:
        ValueError: The file is bad, or of another device than the cluster has.
    """
    file = own_file(cluster) if path is None else path
    if file is None:
        return cluster
    from rankwright.cost_model.apply_calibration import apply_calibration  # few plans have one
    from rankwright.cost_model.calibration import read_calibration

    return apply_calibration(cluster, read_calibration(file))


def check_positive(option: str, number: float | None, unit: str = "") -> None:
    """Raise ValueError where `option` was given a number that is not finite and above 0."""
    if number is not None and not 0 < number < math.inf:
        raise ValueError(f"{option} must be above 0{unit} and finite, got {number:g}")


def refuse_beside_trace(trace: Path | None, given: Mapping[str, object]) -> None:
    """Raise ValueError where an option in `given` has a value beside `--trace`; names it."""
    twice = next((name for name, value in given.items() if value is not None), None)
    if trace is not None and twice is not None:
        raise ValueError(f"{twice} and --trace both say what the requests are; give one")


def workload(
    *,
    isl: int,
    osl: int,
    concurrency: int | None = None,
    rate: float | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    percentile: float = 50,
    objective: Objective = "throughput",
) -> Workload:
    """Return the `Workload` that the options describe.

    Raises:
        ValueError: Concurrency and rate are both given, or a length, limit, rate or percentile is
            out of range; names the option.
    """
    if concurrency is not None and rate is not None:
        raise ValueError("--concurrency and --rate are two ways to say the load; give one")
    for name, tokens in (("--isl", isl), ("--osl", osl)):
        if tokens > MOST_TOKENS:
            raise ValueError(f"{name} must be at most {MOST_TOKENS:,} tokens, got {tokens:,}")
    if concurrency is not None and concurrency > MOST_REQUESTS:
        raise ValueError(f"--concurrency must be at most {MOST_REQUESTS:,}, got {concurrency:,}")
    for name, number in (("--rate", rate), ("--ttft", ttft_ms), ("--tpot", tpot_ms)):
        check_positive(name, number)
    if not 0 < percentile < 100:
        raise ValueError(f"--percentile must be between 0 and 100, got {percentile:g}")
    return Workload(
        input_tokens=isl,
        output_tokens=osl,
        concurrency=concurrency,
        request_rate=rate,
        ttft_limit_s=None if ttft_ms is None else ttft_ms / 1e3,
        tpot_limit_s=None if tpot_ms is None else tpot_ms / 1e3,
        percentile=percentile,
        objective=objective,
    )


def with_dtypes(spec: ModelSpec, dtype: Dtype | None, kv_dtype: Dtype | None) -> ModelSpec:
    """Return `spec` as if its checkpoint had been stored in other number formats.

    A format of 16 or 32 bits is for all weights and activations; a shorter one is for the matrices
    of the layers, as checkpoints are quantised, and leaves embeddings, head and norms alone.
    """
    if dtype is not None:
        matrices = {"attention": dtype, "feed_forward": dtype, "scale_group": None}
        if BITS[dtype] >= 16:
            weights = matrices | {"embedding": dtype, "head": dtype, "other": dtype}
            spec = spec.model_copy(update={"dtype": dtype, "kv_dtype": kv_dtype or dtype})
        else:
            weights = matrices
        spec = spec.model_copy(
            update={"weight_dtypes": spec.weight_dtypes.model_copy(update=weights)}
        )
    if kv_dtype is not None:
        spec = spec.model_copy(update={"kv_dtype": kv_dtype})
    return spec
