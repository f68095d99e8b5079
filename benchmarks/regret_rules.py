"""What would have been run without a planner: rules that guides and other tools go by.

Rules decide a split; the batch is then what memory and the load allow, as for every other plan.
"""

from rankwright.cost_model.legality import has_experts
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.planner.make_plan import Pins
from rankwright.topology.cluster import Cluster
from regret_scenarios import Option, Scenario, option_of, plan

_ROOM = 1.5  # times the weights must fit into the memory of the GPUs of a copy
_BYTES_PER_PARAMETER = 2


def rules_of_thumb(
    scenario: Scenario, model: ModelSpec, cluster: Cluster
) -> dict[str, Option | None]:
    """Return what common guides, and AIConfigurator's rule, would run.

    TP over all GPUs, whatever the model; the tree of vLLM's guide (docs, distributed serving): one
    GPU each where the model fits one, tensor parallelism over the machine where it does not; and
    the narrowest group that holds 1.5 times the weights, as often as there is room for it.

    None of them looks at the load, and none can pick a pipeline, experts whole on their ranks of a
    model without latent attention, or fewer requests at once for a limit. What AIConfigurator's
    search could pick at best is in `regret_judge.py`.
    """
    whole = Pins(tp=cluster.num_gpus, pp=1, dp=1, cp=1, attention="tp")
    copies = Pins(tp=1, pp=1, dp=cluster.num_gpus, cp=1)
    tensor = plan(scenario, model, cluster, whole, limited=False)
    copied = plan(scenario, model, cluster, copies, limited=False)
    narrow = plan(scenario, model, cluster, smallest_width(scenario, model, cluster), limited=False)
    tree = copied or tensor
    return {
        "TP over all GPUs": option_of(tensor, scenario) if tensor else None,
        "one GPU if it fits, else TP": option_of(tree, scenario) if tree else None,
        "AIConfigurator: least TP for 1.5 x weights": (
            option_of(narrow, scenario) if narrow else None
        ),
    }


def smallest_width(scenario: Scenario, model: ModelSpec, cluster: Cluster) -> Pins:
    """Return the split of AIConfigurator's `generate`, which decides by memory alone.

    The smallest power of two of GPUs with more than 1.5 times the weights in memory, at most a
    machine, without pipeline; as many copies as there is room for. Experts are cut by columns over
    the group, except that models of latent attention that are to give throughput attend for other
    requests on each rank and hold whole experts.

    Source: aiconfigurator, `src/aiconfigurator/generator/naive.py` (`_calculate_min_tp` and
    `_resolve_parallelization`, commit 00ae87c).
    """
    node = cluster.nodes[0]
    memory_bytes = min(gpu.total_memory_bytes for gpu in node.gpus)
    if scenario.budget_bytes is not None:
        memory_bytes = min(memory_bytes, scenario.budget_bytes)
    needed = estimated_weight_bytes(model) * _ROOM / memory_bytes
    width = 1
    while width < needed:
        width *= 2
    width = min(width, len(node.gpus), cluster.num_gpus)
    has_latents = any(run.layer.attention.kind == "mla" for run in model.layer_runs)
    is_shared = has_experts(model) and has_latents and scenario.objective == "throughput"
    return Pins(
        tp=width,
        pp=1,
        ep=width if is_shared else 1,
        dp=cluster.num_gpus // width,
        cp=1,
        attention="dp" if is_shared and width > 1 else "tp",
    )


def estimated_weight_bytes(model: ModelSpec) -> int:
    """Return the weights as AIConfigurator's `generate` takes them: from the shape, at two bytes.

    Four square matrices of attention a layer, whatever its heads; one embedding; of models with
    experts every layer with all of them, and no shared ones.

    Source: `_estimate_model_weight_bytes` in the same file.
    """
    hidden = model.hidden_size
    blocks = [layer.feed_forward for layer in model.layers]
    if has_experts(model):
        experts = next(block for block in blocks if block.kind == "moe")
        feed_forward = experts.num_experts * (3 * hidden * experts.intermediate_size + hidden)
    else:
        feed_forward = 3 * hidden * blocks[0].intermediate_size
    layer = 4 * hidden * hidden + feed_forward + 4 * hidden
    parameters = model.vocab_size * hidden + model.num_layers * layer
    return _BYTES_PER_PARAMETER * parameters
