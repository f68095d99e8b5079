"""A plan as one sbatch script that needs no other file."""

from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.layout import needs_force, node_shares, start_budget_s
from rankwright.templates.options import SlurmOptions
from rankwright.templates.slurm_job import SLURM_FILE, fill_job, plan_file
from rankwright.templates.variables import checked_environment


def slurm_files(plan: OwnPlan, options: SlurmOptions) -> dict[str, str]:
    """Return the sbatch script of `plan` by file name.

    Raises:
        ValueError: The machines cannot be told apart, or the plan is too large.
    """
    shares = node_shares(plan, told_apart=True)
    script = fill_job(
        "slurm/rankwright.sbatch.j2",
        plan,
        options,
        (plan_file(plan),),
        environment=checked_environment(plan),
        start_s=start_budget_s(shares),
        force=needs_force(shares),
    )
    return {SLURM_FILE: script}
