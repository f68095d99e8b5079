"""Measures every machine of a job and the way between them: of a torchrun, or of a Slurm job.

Under Slurm each machine runs `python -m rankwright.executor.measure_job`, started by srun.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from rankwright.executor.measure import MEASURE_TIMEOUT_S, Team, make_team, measure, run_ranks
from rankwright.topology.apply_between import apply_between
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.gather import GATHER_TIMEOUT_S, Method, find_method, gather, read_here
from rankwright.topology.gather_slurm import address_of, labelled_lines, probes_of_job, run_on_each
from rankwright.topology.gather_torchrun import bring_together, machine_of
from rankwright.topology.measurements import Measurements

Progress = Callable[[str], None]

# Of Slurm's tasks, where no port is agreed on beforehand: below those that systems hand out
# themselves (32768 on), above those of common services.
_PORTS = range(20000, 30000)
_STARTING_S = 60.0
# The line before the error of a task.
_ERROR = "# failed"


def measure_job(
    method: Method = "auto",
    *,
    require_gpu: bool = False,
    fabric: str | None = None,
    progress: Progress = lambda text: None,
    timeout_s: float = MEASURE_TIMEOUT_S,
) -> Cluster | None:
    """Return the machines of the job with what they and the way between them were measured to do.

    Args:
        method: As for `gather`; 'ray' and 'kubernetes' only read.
        require_gpu: Refuse machines without a GPU.
        fabric: The network between them, as shorthand has it; None: what their ports say.
        progress: Gets a line for each part of the work.
        timeout_s: Until the measurement must be done.

    Returns:
        The cluster; None in a process of torchrun that only helps.

    Raises:
        ProbeError: A machine could not be read, or a rank failed.
        ValueError: The method does not apply here, or cannot measure.
    """
    chosen = find_method(os.environ) if method == "auto" else method
    if chosen in ("ray", "kubernetes"):
        raise ValueError(
            f"--measure does not run with --gather {chosen}; run it within a Slurm job or under "
            "torchrun, or on each machine with --gather none"
        )
    if chosen == "slurm":
        return _over_slurm(os.environ, require_gpu, fabric, progress, timeout_s)
    if chosen == "torchrun":
        return _over_torchrun(os.environ, require_gpu, fabric, progress, timeout_s)
    cluster = gather("none", require_gpu=require_gpu, fabric=fabric)
    assert cluster is not None
    return measure(cluster, progress=progress, timeout_s=timeout_s)


def _over_torchrun(
    environment: Mapping[str, str],
    require_gpu: bool,
    fabric: str | None,
    progress: Progress,
    timeout_s: float,
) -> Cluster | None:
    machine = machine_of(environment)
    if not machine.leads:
        return None
    # Torchrun's store has the port itself, the next one is where the machines meet.
    port = machine.port_after(2)

    def assign(found: list[Cluster]) -> bytes:
        try:
            return team_text(make_team([each.nodes[0] for each in found], machine.host, port))
        except ValueError as error:
            raise ProbeError("measure_failed", str(error)) from None

    found, said = bring_together(machine, lambda: read_here(require_gpu), GATHER_TIMEOUT_S, assign)
    measured = run_ranks(read_team(said), machine.number, progress, timeout_s)
    if measured is None:
        return None
    return apply_between(found, measured, fabric=fabric, source="probe over torchrun")


def _over_slurm(
    environment: Mapping[str, str],
    require_gpu: bool,
    fabric: str | None,
    progress: Progress,
    timeout_s: float,
) -> Cluster:
    found = probes_of_job(environment, require_gpu=require_gpu, timeout_s=GATHER_TIMEOUT_S)
    nodes = [each.nodes[0] for each in found]
    team = make_team(nodes, address_of(nodes[0].name), secrets.choice(_PORTS))

    def tell(line: str) -> None:
        for said in labelled_lines(line).get(0, ()):
            progress(said)

    output, errors = run_on_each(
        environment,
        [
            *("rankwright.executor.measure_job", "--team", team_text(team).decode()),
            *("--timeout", str(timeout_s)),
        ],
        timeout_s + _STARTING_S,
        tell,
    )
    measured = read_result(output, errors)
    return apply_between(found, measured, fabric=fabric, source="probe over Slurm")


def read_result(output: str, errors: str) -> Measurements:
    """Return what task 0 of a measurement printed.

    Args:
        output: Of all tasks, with labels.
        errors: Their standard error.

    Raises:
        ProbeError: It printed nothing, or another task why it failed.
    """
    lines = labelled_lines(output)
    failures = [
        f"{name}: {json.loads(''.join(said))['error']}"
        for name, *said in lines.values()
        if said and said.pop(0) == _ERROR
    ]
    if failures:
        # The others only lost their peer.
        first = next((text for text in failures if "onnection" not in text), failures[0])
        raise ProbeError("measure_failed", first)
    try:
        return Measurements.model_validate_json("".join(lines.get(0, [""])[1:]))
    except ValidationError:
        reason = " ".join(errors.split())[-300:] or "it said nothing"
        raise ProbeError(
            "measure_failed", f"the measurement of the job left no result: {reason}"
        ) from None


def team_text(team: Team) -> bytes:
    """Return a team as text; `read_team` reads it."""
    return json.dumps([team.places, team.device, team.host, team.port]).encode()


def read_team(text: bytes) -> Team:
    """Return the team of `team_text`."""
    places, device, host, port = json.loads(text)
    return Team(tuple((node, gpu) for node, gpu in places), device, host, port)


def main() -> None:
    """Run the ranks of this machine, a task of Slurm's; task 0 prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--team", required=True)
    parser.add_argument("--timeout", type=float, required=True)
    arguments = parser.parse_args()

    def progress(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    team = read_team(arguments.team.encode())
    try:
        number = int(os.environ["SLURM_PROCID"])
        measured = run_ranks(team, number, progress, arguments.timeout)
    except ProbeError as error:
        print(_ERROR, json.dumps({"error": str(error)}), sep="\n")
        raise SystemExit(4) from None
    if measured is not None:
        print(measured.model_dump_json(indent=0))  # in lines: srun cuts those above 1 KiB


if __name__ == "__main__":
    main()
