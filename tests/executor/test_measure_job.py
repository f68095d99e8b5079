"""Several machines are measured together: two agents of torchrun, and two nodes of a real Slurm.

They are processes of this machine, on CPU ranks over gloo.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.ports import free_port
from tests.templates.slurm_rig.rig import SlurmRig, why_not

from rankwright.cli import main
from rankwright.executor.interface import interface_towards
from rankwright.executor.measure import make_team
from rankwright.executor.measure_job import read_result, read_team, team_text
from rankwright.executor.measure_network import rounds_of
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.graph import port_share_bytes_per_s
from rankwright.topology.shorthand import parse_cluster

PROBE = (sys.executable, "-m", "rankwright", "probe", "--measure")
OPERATIONS = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"}


def check(cluster: Cluster, ranks: tuple[int, int]) -> None:
    """Both machines and the way between them were timed, and plans go by it."""
    assert cluster.num_nodes == 2
    measured, fabric = cluster.measurements, cluster.fabric
    assert measured is not None
    assert fabric is not None
    assert measured.backend == "gloo"
    assert [(pair.a, pair.b) for pair in measured.node_pairs] == [(0, 1)]
    pair = measured.node_pairs[0]
    for rate in (pair.forth_bytes_per_s, pair.back_bytes_per_s, pair.single_bytes_per_s):
        assert 1e6 < rate < 1e12
    assert fabric.bytes_per_s == 25e9 / 8
    assert fabric.measured_bytes_per_s is not None
    assert fabric.measured_bytes_per_s == min(pair.forth_bytes_per_s, pair.back_bytes_per_s)
    assert fabric.latency_s == pair.latency_s
    share = port_share_bytes_per_s(cluster, cluster.node(0), 0)
    assert share == pytest.approx(min(fabric.measured_bytes_per_s / ranks[0], 16e9))
    for node, count in enumerate(ranks):
        assert {row.gpu for row in measured.memory if row.node == node} == set(range(count))
        assert {row.gpu for row in measured.gemms if row.node == node} == set(range(count))
        within = [row for row in measured.collectives if row.nodes == (node,)]
        assert bool(within) == (count > 1)
    wide = [row for row in measured.collectives if row.nodes == (0, 1)]
    assert {row.operation for row in wide} == OPERATIONS
    assert {len(row.gpus) for row in wide} == {1, min(ranks)}
    assert min(row.size_bytes for row in wide) == 1024


def test_two_agents_of_torchrun_measure_together(tmp_path: Path) -> None:
    port = free_port(3)
    made = tmp_path / "cluster.json"
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node-rank", str(number), "--nproc-per-node", "1", "--no-python"),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("--local-addr", "127.0.0.1"),
                *(*PROBE, "--fabric", "eth25", "-o", str(made)),
            ],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            # One has a core less than the other: machines need not be alike.
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, cores in ((0, sorted(os.sched_getaffinity(0))[:2]), (1, {0}))
    ]
    said = [agent.communicate(timeout=250)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "messages between machines" in said[0]
    assert "between machines" not in said[1]
    cluster = Cluster.model_validate_json(made.read_text())
    check(cluster, (min(2, len(os.sched_getaffinity(0))), 1))
    assert cluster.source == "probe over torchrun"
    # A plan goes by the file.
    assert main(["plan", "Qwen/Qwen3-0.6B", "--cluster", str(made), "--json"]) == 0


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[SlurmRig]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # its daemons inherit it, so that a node has one CPU rank
    try:
        with SlurmRig(tmp_path / "rig", num_nodes=2, gpus_per_node=1) as rig:
            yield rig
    finally:
        os.sched_setaffinity(0, cores)


def test_two_nodes_of_slurm_measure_together(slurm: SlurmRig, tmp_path: Path) -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU, which both nodes of the rig would take")
    made = tmp_path / "cluster.json"
    script = tmp_path / "measure.sbatch"
    script.write_text(
        "#!/bin/sh\n#SBATCH --nodes=2 --exclusive\n"
        f"exec {' '.join(PROBE)} --fabric eth25 -o {made}\n"
    )
    path = os.pathsep.join(os.path.abspath(each) for each in sys.path if each)
    ended = slurm.wait(slurm.submit(script, {"PYTHONPATH": path}), timeout_s=250)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    assert "messages between machines" in ended.output
    cluster = Cluster.model_validate_json(made.read_text())
    check(cluster, (1, 1))
    assert cluster.source == "probe over Slurm"


def labelled(task: int, *lines: str) -> str:
    return "".join(f"{task}: {line}\n" for line in lines)


def test_the_task_that_failed_by_itself_is_named() -> None:
    lost = json.dumps({"error": "rank 0 of the measurement failed: Connection closed by peer"})
    own = json.dumps({"error": "rank 1 of the measurement failed: out of memory"})
    output = labelled(0, "n0", "# failed", lost) + labelled(1, "n1", "# failed", own)
    with pytest.raises(ProbeError, match=r"n1: rank 1 .* out of memory") as caught:
        read_result(output, "")
    assert caught.value.kind == "measure_failed"
    with pytest.raises(ProbeError, match="left no result: srun: error: broken"):
        read_result(labelled(0, "n0"), "srun: error: broken")


@pytest.mark.parametrize("count", range(2, 10))
def test_every_machine_meets_every_other_once_and_one_at_a_time(count: int) -> None:
    rounds = list(rounds_of(count))
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for pairs in rounds:
        busy = [machine for pair in pairs for machine in pair]
        assert len(busy) == len(set(busy))


def test_a_team_is_the_same_after_it_travelled() -> None:
    nodes = [parse_cluster("2xl4").nodes[0], parse_cluster("3xl4").nodes[0]]
    team = make_team(nodes, "10.0.0.1", 1234)
    assert team.places == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert team.ranks_of(1) == [2, 3, 4]
    assert read_team(team_text(team)) == team


def test_machines_with_and_without_gpus_are_not_measured_together() -> None:
    nodes = [parse_cluster("2xl4").nodes[0], parse_cluster("2xcpu").nodes[0]]
    with pytest.raises(ValueError, match="has no GPU and others have"):
        make_team(nodes, "10.0.0.1", 1234)


@pytest.mark.parametrize("method", ["ray", "kubernetes"])
def test_ways_that_only_read_refuse_to_measure(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--measure", "--gather", method]) == 2
    assert "--measure does not run with" in capsys.readouterr().err


def test_the_interface_of_an_address() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such host") is None
