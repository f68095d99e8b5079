"""What the explanations of all kinds of plan say in the same words."""

from collections.abc import Iterable, Sequence

from rankwright.cost_model.prediction import Part
from rankwright.cost_model.workload import Workload
from rankwright.planner.figures import figure
from rankwright.planner.plan import Certificate


def join_sections(sections: Iterable[str]) -> str:
    """Return the sections with a blank line between them, without those that are empty."""
    return "\n\n".join(section for section in sections if section) + "\n"


def section(title: str, lines: Sequence[str]) -> str:
    """Return the lines below their title; nothing where there are none."""
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) if lines else ""


def time_lines(title: str, parts: Sequence[Part], indent: str = "") -> list[str]:
    """Return the seconds of `parts` and of all, the longest first; nothing where all take none."""
    total_s = sum(part.seconds for part in parts)
    if not total_s:
        return []
    lines = [f"{title}, {figure(total_s * 1e3)} ms:"]
    for part in sorted(parts, key=lambda one: -one.seconds):
        lines.append(
            f"  {part.name:<26}{figure(part.seconds * 1e3):>12} ms {part.seconds / total_s:>6.0%}"
            f"  bound by {part.bound} ({part.source})"
        )
    return [f"{indent}{line}" for line in lines]


def limit_texts(load: Workload) -> tuple[str, str]:
    """Return the limits of TTFT and TPOT as they stand behind a figure in ms."""
    first, each = (
        "" if limit_s is None else f", limit {figure(limit_s * 1e3)}"
        for limit_s in (load.ttft_limit_s, load.tpot_limit_s)
    )
    return first, each


def proof_lines(proof: Certificate, looked_at: str) -> list[str]:
    """Return the objective, its bound and what binds.

    A warning comes first where the solver did not say that the plan is the best.

    Args:
        proof: Of the plan.
        looked_at: What the program chose from, and how much of it.
    """
    lines = [
        f"Chosen for {proof.objective}: {figure(proof.objective_value, 5)}, bound "
        f"{figure(proof.bound, 5)}, gap {proof.gap:.2g} ({proof.solver}, {proof.status}, "
        f"{figure(proof.solve_s * 1e3, 3)} ms)",
        f"  {looked_at}",
        f"  binding: {proof.binding_constraint}",
    ]
    if proof.status != "optimal":
        warning = f"NOT PROVED BEST: {proof.status}; a better plan may be better by {proof.gap:.2%}"
        lines.insert(0, warning)
    return lines
