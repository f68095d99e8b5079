"""`rankwright predict`: what one given split would do; no search."""

from typing import Annotated

import typer
from rich.markup import escape

from rankwright.cli import options
from rankwright.cli.output import (
    console,
    memory_table,
    parts_table,
    prediction_table,
    print_json,
)
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.shards import even_range
from rankwright.cost_model.split import Split
from rankwright.topology.read_cluster import read_cluster


def run(
    model: options.Model,
    cluster: options.Cluster = "auto",
    tp: options.Tp = 1,
    pp: options.Pp = 1,
    ep: options.Ep = 1,
    dp: options.Dp = 1,
    cp: options.Cp = 1,
    attention: options.AttentionOption = "tp",
    cp_exchange: options.CpExchangeOption = "gather",
    engine: options.EngineOption = "rankwright",
    isl: options.InputTokens = 1024,
    osl: options.OutputTokens = 128,
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences that a replica decodes at once.")
    ] = 1,
    calibration: options.CalibrationFile = None,
    dtype: options.DtypeOption = None,
    kv_dtype: options.KvDtype = None,
    as_json: options.Json = False,
) -> None:
    """Predict speed and memory of one given split of MODEL."""
    spec = options.with_dtypes(read_model(model), dtype, kv_dtype)
    tp, pp, ep, dp, cp = tp or 1, pp or 1, ep or 1, dp or 1, cp or 1
    if pp > spec.num_layers:
        raise ValueError(f"--pp is {pp}, {spec.name} has {spec.num_layers} layers to share")
    stages = [even_range(spec.num_layers, pp, stage) for stage in range(pp)]
    machines = options.calibrated(read_cluster(cluster), calibration)
    split = Split(
        tp=tp,
        pp=pp,
        ep=ep,
        dp=dp,
        cp=cp,
        attention=attention or "tp",
        cp_exchange=cp_exchange or "gather",
        stage_layers=tuple(stop - start for start, stop in stages),
        max_batch_size=batch_size,
    )
    if split.num_gpus > machines.num_gpus:
        raise ValueError(
            f"{split.label()} takes {split.num_gpus} GPUs, {machines.describe()} has "
            f"{machines.num_gpus}"
        )
    load = options.workload(isl=isl, osl=osl, concurrency=concurrency, rate=rate)
    prediction = predict(spec, machines, load, split, engine)
    if as_json:
        print_json(prediction)
        return
    out = console()
    out.print(f"[bold]{escape(spec.name)}[/] on {machines.describe()}: [bold]{split.label()}[/]")
    capacity_bytes = min(gpu.memory_bytes for node in machines.nodes for gpu in node.gpus)
    for part in (
        prediction_table(prediction, split.num_gpus),
        memory_table(prediction, capacity_bytes),
        parts_table("decode step", prediction.decode_parts),
        parts_table("the steps that prefill a prompt", prediction.prefill_parts),
    ):
        out.print()
        out.print(part)
