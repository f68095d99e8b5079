"""`AutoParallelConfig`: everything that a plan depends on, in one value.

The first four names are those of TensorRT-LLM's `AutoParallelConfig`, with the same meaning, so
that a configuration written for it plans here as it stands.
"""

from functools import cached_property

from pydantic import Field, model_validator

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Objective, Workload
from rankwright.planner.disaggregate import DEFAULT_ENGINE, plan_disaggregated
from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.topology.cluster import Cluster
from rankwright.topology.devices import DEVICES, resolve_key
from rankwright.topology.probe import ProbeError, probe
from rankwright.topology.shorthand import parse_cluster
from rankwright.topology.value import Value

# What is planned for where this machine has no GPU: the card most of the published measurements
# that the cost model is checked against were taken on.
_USUAL_GPU = "h100-sxm"
_GB = 10**9


class AutoParallelConfig(Value):
    """How many GPUs there are, what each may hold, and what they shall serve.

    >>> config = AutoParallelConfig(
    ...     world_size=8, gpus_per_node=4, memory_budget_per_device=24, gpu="a100-sxm-40gb"
    ... )
    >>> config.cluster().describe()
    '2 x (4 x a100-sxm-40gb) + infiniband 4 x 400 Gb/s'
    """

    world_size: int = Field(ge=1, description="GPUs in all")
    gpus_per_node: int = Field(default=8, ge=1, description="GPUs of one machine")
    memory_budget_per_device: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="GB (1e9 bytes) of each GPU to use; None: all of it",
    )
    enable_pipeline_parallelism: bool = True
    model: str = Field(
        default="meta-llama/Llama-3.1-8B", description="hub id, folder or config.json"
    )
    gpu: str | None = Field(
        default=None, description=f"key or alias; None: this machine's, else {_USUAL_GPU}"
    )
    interconnect: str = Field(
        default="ib400", description="between machines: ib, roce, eth and Gb/s"
    )
    input_tokens: int = Field(default=1024, ge=1)
    output_tokens: int = Field(default=128, ge=1)
    concurrency: int | None = Field(default=None, ge=1, description="requests in flight at most")
    request_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="requests/s"
    )
    ttft_limit_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tpot_limit_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    percentile: float = Field(default=50, gt=0, lt=100)
    objective: Objective = "throughput"
    tp: int | None = Field(default=None, ge=1, description="pins; None leaves one to the planner")
    pp: int | None = Field(default=None, ge=1)
    ep: int | None = Field(default=None, ge=1)
    dp: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_sizes(self) -> "AutoParallelConfig":
        size, per_node = self.world_size, self.gpus_per_node
        if size > per_node and size % per_node:
            lower = size // per_node * per_node
            raise ValueError(
                f"world_size={size} is no multiple of gpus_per_node={per_node}; use {lower} or "
                f"{lower + per_node} GPUs, or another number a node"
            )
        if self.gpu is not None:
            resolve_key(self.gpu)  # names the nearest devices
        return self

    def workload(self) -> Workload:
        """Return what is asked of the model."""
        return Workload(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.concurrency,
            request_rate=self.request_rate,
            ttft_limit_s=self.ttft_limit_s,
            tpot_limit_s=self.tpot_limit_s,
            percentile=self.percentile,
            objective=self.objective,
        )

    def cluster(self) -> Cluster:
        """Return the cluster that the sizes describe.

        Raises:
            ValueError: No machine holds so many of this GPU, or the interconnect is unknown.
        """
        gpu, _ = self._gpu_found
        nodes = max(1, self.world_size // self.gpus_per_node)
        if nodes == 1:
            return parse_cluster(f"{self.world_size}x{gpu}")
        return parse_cluster(f"{nodes}x{self.gpus_per_node}x{gpu}+{self.interconnect}")

    def plan(self, model: ModelSpec | None = None) -> Plan:
        """Return the best plan.

        Args:
            model: Takes the place of the one that `self.model` names.

        Raises:
            NoFeasiblePlanError: Nothing fits.
            ValueError: A name is unknown or a size out of range.
        """
        _, assumption = self._gpu_found
        budget = self.memory_budget_per_device
        return make_plan(
            model or read_model(self.model),
            self.cluster(),
            self.workload(),
            memory_budget_bytes=None if budget is None else int(budget * _GB),
            pins=Pins(tp=self.tp, pp=self.pp, ep=self.ep, dp=self.dp),
            allow_pipeline=self.enable_pipeline_parallelism,
            assumptions=assumption,
        )

    def plan_disaggregated(
        self, model: ModelSpec | None = None, engine: str = DEFAULT_ENGINE
    ) -> DisaggregatedPlan:
        """Return the best plan with separate pools for prefill and decode.

        Args:
            model: Takes the place of the one that `self.model` names.
            engine: That shall run it: vllm, sglang or trtllm.

        Raises:
            NoFeasiblePlanError: Nothing fits.
            ValueError: A name is unknown, a size out of range, or a degree is pinned, which would
                be that of one pool.
        """
        pinned = Pins(tp=self.tp, pp=self.pp, ep=self.ep, dp=self.dp).describe()
        if pinned:
            raise ValueError(f"{pinned} is pinned, for one pool; leave it out for separate pools")
        _, assumption = self._gpu_found
        budget = self.memory_budget_per_device
        return plan_disaggregated(
            model or read_model(self.model),
            self.cluster(),
            self.workload(),
            memory_budget_bytes=None if budget is None else int(budget * _GB),
            allow_pipeline=self.enable_pipeline_parallelism,
            engine=engine,
            assumptions=assumption,
        )

    @cached_property
    def _gpu_found(self) -> tuple[str, tuple[str, ...]]:
        """The device key, and what was assumed to find it."""
        if self.gpu is not None:
            return resolve_key(self.gpu), ()
        try:
            devices = {gpu.device for node in probe().nodes for gpu in node.gpus}
        except ProbeError as error:
            why = f"this machine's cannot be read ({error})"
            return _USUAL_GPU, (f"GPU: {_USUAL_GPU}, since {why}",)
        found = sorted(devices & set(DEVICES) - {"cpu"})
        if len(found) == 1:
            return found[0], (f"GPU: {found[0]}, as in this machine",)
        why = "has no GPU" if not found else f"has several kinds ({', '.join(found)})"
        return _USUAL_GPU, (f"GPU: {_USUAL_GPU}, since none was named and this machine {why}",)
