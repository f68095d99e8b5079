"""Brings the machines of a torchrun together: each probes itself and tells machine 0."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.probe_message import parse_message
from rankwright.topology.rendezvous import collect, send


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine's place in a torchrun.

    Attributes:
        number: Of this machine; 0 has the answer.
        count: Machines.
        host: Address of machine 0.
        port: Torchrun's own; ours follow it.
        key: That all machines derive alike.
        leads: Whether this process speaks for its machine.
    """

    number: int
    count: int
    host: str
    port: int
    key: bytes
    leads: bool

    def port_after(self, step: int) -> int:
        """Return the port `step` after torchrun's, or before it where there is none."""
        return self.port + step if self.port + step <= 65535 else self.port - step


def machine_of(environment: Mapping[str, str]) -> Machine:
    """Return the place of this process.

    Raises:
        ValueError: It was not started by torchrun.
    """
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if name not in environment
    ]
    if missing:
        raise ValueError(
            f"this is no process of torchrun: {', '.join(missing)} is not set; call it as "
            "`torchrun --nnodes 2 ... --no-python rankwright probe`"
        )
    local = integer_of(environment, "LOCAL_WORLD_SIZE", 1)
    number = integer_of(environment, "RANK", 0) // local
    count = integer_of(environment, "WORLD_SIZE", 1) // local
    return Machine(
        number=integer_of(environment, "GROUP_RANK", number),
        count=integer_of(environment, "GROUP_WORLD_SIZE", count),
        host=environment["MASTER_ADDR"],
        port=integer_of(environment, "MASTER_PORT", 0),
        key=_key(environment),
        leads=integer_of(environment, "LOCAL_RANK", 0) == 0,
    )


def integer_of(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the number in a variable, `default` where there is none."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default


def bring_together(
    machine: Machine,
    probe_here: Callable[[], Cluster],
    timeout_s: float,
    answer: Callable[[list[Cluster]], bytes] | None = None,
) -> tuple[list[Cluster], bytes]:
    """Return, on machine 0, what all machines read; on each, what machine 0 answers to that.

    Args:
        machine: This one.
        probe_here: Reads it.
        timeout_s: Until all must have spoken.
        answer: On machine 0, makes the answer; all machines must give one, or none.

    Raises:
        ProbeError: A machine could not be read or did not answer.
    """
    problem: ProbeError | None = None
    try:
        message = probe_here().model_dump_json()
    except ProbeError as error:
        problem = error
        message = _error(error)
    found: list[Cluster] = []
    failures: list[ProbeError] = []

    def reply(messages: list[bytes]) -> bytes:
        try:
            for index, text in enumerate(messages):
                where = f"machine {index} of {machine.count}"
                found.append(parse_message(text.decode(errors="replace"), where))
            return b"" if answer is None else answer(found)
        except ProbeError as error:  # the others must hear of it, too
            failures.append(error)
            return _error(error).encode()

    # The next one: torchrun's store has the port itself.
    port = machine.port_after(1)
    try:
        if machine.number > 0:
            said = send(
                message.encode(),
                number=machine.number,
                host=machine.host,
                port=port,
                key=machine.key,
                timeout_s=timeout_s,
            )
            if problem is not None:
                raise problem
            if said.startswith(b'{"error"'):
                raise ProbeError("gather_failed", f"machine 0 gave up: {said.decode()[:400]}")
            return [], said
        said = collect(
            message.encode(),
            count=machine.count,
            port=port,
            key=machine.key,
            timeout_s=timeout_s,
            answer=reply,
        )
    except OSError as error:  # which TimeoutError is, too
        raise ProbeError(
            "gather_failed",
            f"the machines of this run did not meet on port {port}: {error}; check that it is open "
            "between them, or choose another --master-port",
        ) from None
    if failures:
        raise failures[0]
    return found, said


def _error(error: ProbeError) -> str:
    return json.dumps({"error": {"class": error.kind, "message": str(error)}})


def _key(environment: Mapping[str, str]) -> bytes:
    """Return what only processes of this run know, or, where the run has no id, its address."""
    words = [
        environment.get("RANKWRIGHT_AUTHKEY", ""),
        environment.get("TORCHELASTIC_RUN_ID", ""),
        environment["MASTER_ADDR"],
        environment["MASTER_PORT"],
    ]
    return hashlib.sha256("\n".join(["rankwright probe", *words]).encode()).digest()
