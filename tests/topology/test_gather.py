"""All machines of a job, read where they are: over sockets, under torchrun, in a real Slurm."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.ports import free_port
from tests.templates.slurm_rig.rig import SlurmRig, why_not

from rankwright.cli import main
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.gather import find_method, gather
from rankwright.topology.gather_slurm import read_labelled
from rankwright.topology.gather_torchrun import Machine, bring_together
from rankwright.topology.read_cluster import read_cluster
from rankwright.topology.rendezvous import collect, send
from rankwright.topology.shorthand import parse_cluster

PROBE = (sys.executable, "-m", "rankwright", "probe")
KEY = b"k" * 32


def run_of_torchrun(number: int, count: int, port: int, **more: str) -> dict[str, str]:
    return {
        "RANK": str(number),
        "WORLD_SIZE": str(count),
        "GROUP_RANK": str(number),
        "GROUP_WORLD_SIZE": str(count),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


def test_two_processes_join_over_sockets(tmp_path: Path) -> None:
    port = free_port(2)
    processes = [
        subprocess.Popen(
            [*PROBE, "--json", "--fabric", "eth25"],
            env={**os.environ, **run_of_torchrun(number, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 0)  # the one that waits for the other starts first
    ]
    (helped, _), (answered, said) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert helped == ""
    joined = Cluster.model_validate_json(answered)
    assert joined.num_nodes == 2
    assert joined.fabric is not None
    assert joined.fabric.bytes_per_s == 25e9 / 8


@pytest.mark.skipif(find_spec("torch") is None, reason="torchrun comes with torch")
def test_two_agents_of_torchrun_give_one_cluster(tmp_path: Path) -> None:
    port = free_port(2)
    made = tmp_path / "cluster.yaml"
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node-rank", str(number), "--nproc-per-node", "2", "--no-python"),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("--local-addr", "127.0.0.1"),
                *(*PROBE, "-o", str(made)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert said[0].count("fingerprint") == 1
    assert "fingerprint" not in said[1]
    assert read_cluster(str(made)).num_nodes == 2


def joined(messages: list[bytes]) -> bytes:
    return b"+".join(messages)


def test_a_stranger_and_a_wrong_key_are_not_listened_to() -> None:
    port = free_port()
    found: list[bytes] = []
    place = {"host": "127.0.0.1", "port": port}
    server = threading.Thread(
        target=lambda: found.append(
            collect(b"zero", count=2, key=KEY, timeout_s=20, answer=joined, **place)  # type: ignore[arg-type]
        )
    )
    server.start()
    with pytest.raises(TimeoutError, match="took no word"):
        send(b"evil", number=1, **place, key=b"other", timeout_s=0.5)  # type: ignore[arg-type]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\xff" * 64)
    answer = send(b"one", number=1, **place, key=KEY, timeout_s=20)  # type: ignore[arg-type]
    server.join()
    assert (found, answer) == ([b"zero+one"], b"zero+one")


def test_all_machines_get_the_answer_when_the_last_has_spoken() -> None:
    port = free_port()
    answers: dict[int, bytes] = {}

    def speak(number: int) -> None:
        answers[number] = send(
            str(number).encode(), number=number, host="127.0.0.1", port=port, key=KEY, timeout_s=30
        )

    speakers = [threading.Thread(target=speak, args=(number,)) for number in (3, 1, 2)]
    for speaker in speakers:
        speaker.start()
    made = collect(b"0", count=4, port=port, key=KEY, timeout_s=30, answer=joined)
    for speaker in speakers:
        speaker.join()
    assert made == b"0+1+2+3"
    assert answers == dict.fromkeys((1, 2, 3), made)


def test_a_machine_that_stays_away_is_named() -> None:
    with pytest.raises(TimeoutError, match="machine 1, 2 of 3"):
        collect(b"", count=3, port=free_port(), key=KEY, timeout_s=0.1, answer=joined)


def test_a_machine_that_never_answers_is_a_probe_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in run_of_torchrun(0, 2, free_port(2)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProbeError, match="no word from machine 1") as caught:
        gather(timeout_s=0.2)
    assert caught.value.kind == "gather_failed"


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        ({}, "none"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}, "none"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}, "none"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, "none"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "SLURM_JOB_NUM_NODES": "2"},
            "torchrun",
        ),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "SLURM_JOB_NUM_NODES": "2"}, "ray"),
        ({"RAY_ADDRESS": "http://10.0.0.1:8265"}, "none"),
    ],
)
def test_the_way_follows_from_the_environment(environment: dict[str, str], method: str) -> None:
    assert find_method(environment) == method


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--gather", "slurm"], "no Slurm job"),
        (["--gather", "torchrun"], "no process of torchrun"),
        (["--gather", "mpi"], "'mpi'"),
        (["--gather", "none", "--ray-address", "127.0.0.1:1"], "--ray-address is for"),
        (["--fabric", "fast"], "cannot read the fabric 'fast'"),
    ],
)
def test_a_way_that_does_not_apply_is_refused(
    option: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["probe", *option]) == 2
    assert message in capsys.readouterr().err


def labelled(task: int, *lines: str) -> str:
    return "".join(f"{task:>2}: {line}\n" for line in lines)


def test_lines_of_many_tasks_are_told_apart() -> None:
    texts = [parse_cluster("2xl4").model_dump_json(indent=2).splitlines() for _ in range(11)]
    rows = [labelled(10 - i, f"n{10 - i}", *text) for i, text in enumerate(texts)]
    assert [each.nodes[0].name for each in read_labelled("".join(rows), 11)] == [
        f"n{i}" for i in range(11)
    ]


def test_a_node_that_cannot_be_read_is_named_with_its_own_reason() -> None:
    error = json.dumps({"error": {"class": "device_lost", "message": "a GPU has fallen off"}})
    text = labelled(0, "n0", parse_cluster("2xl4").model_dump_json()) + labelled(1, "n1", error)
    with pytest.raises(ProbeError, match="n1: a GPU has fallen off") as caught:
        read_labelled(text, 2)
    assert caught.value.kind == "device_lost"


@pytest.mark.parametrize("said", ["", "n1\n", "n1\n{", "n1\n[1]", 'n1\n{"nodes": []}'])
def test_a_node_that_says_nothing_useful_is_named(said: str) -> None:
    with pytest.raises(ProbeError, match=r"(n1|node 0 of 1) was not read: .*rankwright probe"):
        read_labelled(labelled(0, *said.splitlines()), 1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmRig]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with SlurmRig(tmp_path_factory.mktemp("slurm") / "rig", num_nodes=2, gpus_per_node=1) as rig:
        yield rig


def test_a_slurm_job_gives_one_cluster_of_its_nodes(slurm: SlurmRig, tmp_path: Path) -> None:
    made = tmp_path / "cluster.json"
    script = tmp_path / "probe.sbatch"
    script.write_text(
        "#!/bin/sh\n#SBATCH --nodes=2 --exclusive\n"
        f"exec {' '.join(PROBE)} --fabric ib400x2 -o {made}\n"
    )
    path = os.pathsep.join(os.path.abspath(each) for each in sys.path if each)
    ended = slurm.wait(slurm.submit(script, {"PYTHONPATH": path}))
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    joined = Cluster.model_validate_json(made.read_text())
    assert joined.num_nodes == 2
    names = ",".join(node.name for node in joined.nodes)
    assert names in ("rig[1-2]", "rig1,rig2")
    assert joined.source == "probe over Slurm"
    assert joined.fabric is not None
    assert joined.fabric.ports_per_node == 2


def test_a_slurm_node_without_a_gpu_is_named_where_one_is_required(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    script = tmp_path / "probe.sbatch"
    script.write_text(
        f"#!/bin/sh\n#SBATCH --nodes=2 --exclusive\nexec {' '.join(PROBE)} --require-gpu --json\n"
    )
    path = os.pathsep.join(os.path.abspath(each) for each in sys.path if each)
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    ended = slurm.wait(slurm.submit(script, {"PYTHONPATH": path}))
    assert (ended.state, ended.exit_code) == ("FAILED", 4), ended.output
    assert "rig1: " in ended.output


@pytest.mark.parametrize("broken", [0, 1])
def test_a_machine_that_cannot_be_read_ends_the_wait_of_all(broken: int) -> None:
    port = free_port(2)  # of torchrun, which has the next one for us
    ended: dict[int, str] = {}

    def run(number: int) -> None:
        def probe_here() -> Cluster:
            if number == broken:
                raise ProbeError("device_lost", "a GPU has fallen off the bus")
            return parse_cluster("1xcpu")

        machine = Machine(number, 2, "127.0.0.1", port, KEY, leads=True)
        with pytest.raises(ProbeError) as caught:
            bring_together(machine, probe_here, 30.0)
        ended[number] = str(caught.value)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("fallen off the bus" in said for said in ended.values())
    assert f"machine {broken} of 2" in ended[0]
