"""The best plans of other shapes, and in numbers why they lost."""

from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.prediction import Part
from rankwright.cost_model.serving import micro_batches_of
from rankwright.cost_model.split import Split
from rankwright.planner.figures import figure
from rankwright.planner.goals import GOALS
from rankwright.planner.ilp import Choice
from rankwright.planner.plan import RunnerUp
from rankwright.planner.search import Search
from rankwright.planner.solver import NoIncumbentError


def find_runners_up(search: Search, choice: Choice, count: int) -> tuple[RunnerUp, ...]:
    """Return the best `count` choices whose shapes differ from `choice` and from each other."""
    seen = {choice.candidate.shape.label()}
    found: list[RunnerUp] = []
    while len(found) < count:
        try:
            other = search.best(without=frozenset(seen), settle=False)
        except NoIncumbentError:
            break
        if other is None:
            break
        seen.add(other.candidate.shape.label())
        reason = _reason(search, choice, other)
        found.append(RunnerUp(split=split_of(other), objective_value=other.value, reason=reason))
    return tuple(found)


def split_of(choice: Choice) -> Split:
    """Return the split of a choice."""
    candidate = choice.candidate
    return Split(
        dp=choice.num_replicas,
        pp=candidate.shape.pp,
        tp=candidate.shape.tp,
        ep=candidate.shape.ep,
        cp=candidate.shape.cp,
        attention=candidate.shape.attention,
        cp_exchange=candidate.shape.cp_exchange,
        stage_layers=candidate.stage_layers,
        max_batch_size=candidate.batch_size,
        chunk_tokens=candidate.chunk_tokens,
        micro_batches=micro_batches_of(candidate.shape.pp, candidate.batch_size),
    )


def _reason(search: Search, choice: Choice, other: Choice) -> str:
    """Return how much worse `other` is, and the term of its step that differs most."""
    goal = GOALS[search.workload.objective]
    worse = abs(other.value - choice.value) / max(abs(choice.value), 1e-12)
    figures = f"{figure(other.value)} against {figure(choice.value)} {goal.unit}"
    if worse < 1e-3:
        saved = other.num_gpus - choice.num_gpus
        return f"as good ({figures})" + (f", but takes {saved} GPUs more" if saved > 0 else "")
    slower = search.workload.objective == "latency"
    text = f"{worse:.1%} {'slower' if slower else f'fewer {goal.unit}'} ({figures})"
    if other.num_gpus < choice.num_gpus:
        text += f", on {other.num_gpus} GPUs instead of {choice.num_gpus}"
    mine, theirs = _per_token(search, choice), _per_token(search, other)
    names = [name for name in theirs if theirs[name] > mine.get(name, 0.0)]
    if not names:
        return text
    name = max(names, key=lambda part: theirs[part] - mine.get(part, 0.0))
    return (
        f"{text}; its steps spend {figure(theirs[name] * 1e6, 3)} GPU-us a token on {name} "
        f"({figure(mine.get(name, 0.0) * 1e6, 3)} in the chosen plan)"
    )


def _per_token(search: Search, choice: Choice) -> dict[str, float]:
    """Return the GPU-seconds that each term costs for an output token, prefill included."""
    candidate = choice.candidate
    place = max(range(len(choice.counts)), key=lambda index: choice.counts[index])
    group, state = candidate.pool.replicas[place], candidate.serving[place]
    pipeline = search.evaluator.pipeline(
        Replicas(group.stages, 1, group.spread), candidate.stage_layers, candidate.shape
    )
    flow = state.flow
    per_step = flow.requests * search.workload.output_tokens  # tokens of one micro-batch's step
    seconds: dict[str, float] = {}
    for stage in range(candidate.shape.pp):
        mixed = pipeline.parts(stage, flow.mixed, flow.mixed_share)
        plain: tuple[Part, ...] = ()
        if flow.plain.decode:
            plain = pipeline.parts(stage, flow.plain, 1 - flow.mixed_share)
        for part in (*mixed, *plain):
            seconds[part.name] = seconds.get(part.name, 0.0) + part.seconds
    return {
        name: total * candidate.shape.gpus_per_stage / per_step for name, total in seconds.items()
    }
