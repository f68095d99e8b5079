"""`launch`: start the ranks of a plan and serve them over HTTP until told to stop."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwright.executor.backends.agent import Agent
from rankwright.executor.checkpoint import read_sampling_defaults
from rankwright.executor.launch_record import (
    make_record,
    remove_record,
    this_process,
    write_record,
)
from rankwright.executor.metrics import Metrics
from rankwright.executor.models.supported import check_supported
from rankwright.executor.parts import PartsSession, start_parts
from rankwright.executor.preflight import (
    SCHEDULER_VARIABLES,
    check_machine,
    find_model,
    joined,
    listen,
    make_options,
)
from rankwright.executor.progress import Progress
from rankwright.executor.run_options import WORKER, DeviceKind, LoadFormat, RunOptions
from rankwright.executor.server import create_app, make_server
from rankwright.executor.service import Service
from rankwright.executor.session import LaunchError, Session, follow, start
from rankwright.executor.signals import Signals
from rankwright.executor.start_checks import check_start
from rankwright.executor.submit import SUBMITTERS, submit_and_follow
from rankwright.executor.tokenizer import Tokenizer
from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan

EXIT_OK, EXIT_LAUNCH_FAILED = 0, 5


def launch(
    plan: Plan | PartsPlan,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    load_format: LoadFormat = "auto",
    model_path: Path | str | None = None,
    backend: str = "auto",
    device: DeviceKind = "auto",
    nnodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int | None = None,
    host_interface: str | None = None,
    start_timeout_s: float = 1800.0,
    drain_s: float = 10.0,
    prefix_cache: bool = True,
    record_expert_load: Path | str | None = None,
    force: bool = False,
    model_name: str | None = None,
    worker: Sequence[str] = WORKER,
    ray_address: str | None = None,
    agent: Agent | None = None,
    **submitted: Any,
) -> int:
    """Serve `plan` until SIGINT or SIGTERM; return 0 then, 5 when a rank fails.

    The first signal stops new requests and lets those that run finish, for `drain_s` seconds; a
    second one ends them at once. With several nodes and torchrun, run it on each with its
    `node_rank`; node 0 serves.

    Args:
        plan: What to run; one of parts on this machine alone.
        host: Address to serve on.
        port: Port to serve on; 0: a free one, which is printed.
        load_format: 'auto': safetensors; 'dummy': random weights.
        model_path: Folder with weights and tokenizer; None: found by the model's name.
        backend: 'local' (torchrun), 'ray', 'slurm' or 'kubernetes'; 'auto': Ray for several
            machines, else local. The last two take `submitted` and nothing else.
        device: 'auto': what the plan says.
        nnodes: Machines this runs on.
        node_rank: Number of this one.
        master_addr: Address of machine 0.
        master_port: Port there for torch; leaders connect to the next one.
        host_interface: Address on which machine 0 listens for leaders; None: `master_addr`.
        start_timeout_s: Until every replica must be ready.
        drain_s: For running requests, after a signal.
        prefix_cache: Share KV blocks of prompts that begin alike.
        record_expert_load: File for how often each expert was chosen, written at the end.
        force: Run also where this machine is not the one the plan was made for.
        model_name: Name in the API; None: the plan's.
        worker: Command of a rank.
        ray_address: Of a Ray cluster; None: `RAY_ADDRESS`, or the one that runs here.
        agent: Started before, so that it has imported PyTorch by now; None: one of its own.
        submitted: Arguments of `submit_and_follow`, for a back end that submits.

    Raises:
        ValueError: Something asked for cannot be: this machine, the weights, the port.
        ProbeError: This machine cannot be read.
        MissingToolError: What the back end or the kernels need is not here.
    """
    parts = parts_of(
        plan,
        {"--backend ray": backend == "ray", "--nnodes": nnodes > 1}
        | {"--master-port": master_port, "--record-expert-load": record_expert_load},
    )
    if backend in SUBMITTERS:
        return submit_and_follow(plan, backend, **submitted)
    if submitted:
        raise TypeError(f"backend {backend!r} takes no {', '.join(submitted)}")
    options = make_options(
        parts[0],
        backend=backend,
        load_format=load_format,
        model_path=model_path,
        device=device,
        nnodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        host_interface=host_interface,
        start_timeout_s=start_timeout_s,
        worker=worker,
        ray_address=ray_address,
        prefix_cache=prefix_cache,
        record_expert_load=record_expert_load,
        force=force,
    )
    if drain_s < 0:
        raise ValueError(f"drain_s is {drain_s:g}, must be 0 or more")
    if not force:
        check_machine(parts[0], options)
    options, tokenizer = find_model(parts[0], options)
    for part in parts:
        check_supported(part)
    for note in dict.fromkeys(note for part in parts for note in check_start(part, options)):
        _say(f"warning: {note}")
    try:
        if node_rank > 0:
            asyncio.run(_follow(parts[0], options, drain_s, agent))
            return EXIT_OK
        defaults, notes = read_sampling_defaults(options.model_path)
        for note in notes:
            _say(note)
        with (
            joined(parts[0], options) as options,
            listen(host, port) as listening,
            _recorded(plan, options, listening),
        ):
            server = _Launch(plan, options, tokenizer, defaults, model_name or plan.model.name)
            asyncio.run(server.run(listening, drain_s, agent))
            return EXIT_OK
    except LaunchError as error:
        _say(str(error))
        return EXIT_LAUNCH_FAILED


def parts_of(plan: Plan | PartsPlan, beyond: Mapping[str, object]) -> tuple[Plan, ...]:
    """Return the plans of one shape that `plan` is of.

    Args:
        plan: One of parts, or itself one of one shape.
        beyond: Options that parts cannot have, by name; true where one was given.

    Raises:
        ValueError: One was.
    """
    if isinstance(plan, Plan):
        return (plan,)
    given = next((name for name, value in beyond.items() if value), None)
    if given is not None:
        raise ValueError(
            f"{given} is for plans of one shape, this one has {plan.label()}: its parts run side "
            "by side on this machine; leave it out, or plan with --mixed-shapes never"
        )
    return plan.parts


class _Launch:
    """One launch on the machine that serves."""

    def __init__(
        self,
        plan: Plan | PartsPlan,
        options: RunOptions,
        tokenizer: Tokenizer,
        defaults: dict[str, float | int],
        model_name: str,
    ) -> None:
        self._plan, self._options = plan, options
        self._tokenizer, self._defaults = tokenizer, defaults
        self._model_name = model_name

    async def run(self, listening: socket.socket, drain_s: float, agent: Agent | None) -> None:
        """Serve on `listening` until a signal comes.

        Raises:
            LaunchError: A rank failed.
        """
        signals = Signals()
        with Progress(self._plan) as progress:
            async with self._started(agent) as session:
                front_end = session.front_end
                service = Service(
                    front_end,
                    self._tokenizer,
                    self._model_name,
                    self._plan.model.vocab_size,
                    self._defaults,
                    Metrics(front_end),
                )
                server = make_server(create_app(service))
                # It answers from the start, so that /health can say "starting".
                http = asyncio.create_task(server.serve(sockets=[listening]))
                try:
                    if await signals.before(session.ready(progress.show)):
                        return
                    for warning in session.warnings():
                        _say(warning)
                    progress.ready(f"{self._model_name} on {url_of(listening)}")
                    await self._serve(session, service, signals, drain_s)
                finally:
                    server.should_exit = True
                    await http

    def _started(
        self, agent: Agent | None
    ) -> contextlib.AbstractAsyncContextManager[Session | PartsSession]:
        if isinstance(self._plan, PartsPlan):
            return start_parts(self._plan, self._options, agent)
        return start(self._plan, self._options, agent)

    async def _serve(
        self, session: Session | PartsSession, service: Service, signals: Signals, drain_s: float
    ) -> None:
        failure = asyncio.create_task(session.failure())
        try:
            if not await signals.before(asyncio.shield(failure)):
                raise failure.result()
            service.draining = True
            await _drain(session, signals, failure, drain_s)
        finally:
            failure.cancel()
        await session.stop()


async def _drain(
    session: Session | PartsSession,
    signals: Signals,
    failure: "asyncio.Task[LaunchError]",
    drain_s: float,
) -> None:
    """Wait for running requests until the time is up or the next signal comes, then end them."""
    front_end = session.front_end
    if front_end.num_outstanding:
        _say(
            f"{front_end.num_outstanding} requests are running; waiting up to {drain_s:g} s "
            "(signal again to stop now)"
        )

    async def idle_or_failed() -> None:
        idle = asyncio.create_task(front_end.idle())
        try:
            await asyncio.wait({idle, failure}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(signals.before(idle_or_failed()), drain_s)
    front_end.abort_all("the server has stopped")


async def _follow(plan: Plan, options: RunOptions, drain_s: float, agent: Agent | None) -> None:
    """Run the ranks of a machine that does not serve, until machine 0 stops them.

    Raises:
        LaunchError: A rank failed.
    """
    signals = Signals()
    with Progress(plan):
        async with follow(plan, options, agent) as ranks:
            if await signals.before(ranks.done()):
                # Whoever ends the job signals machine 0 too: it drains, then stops our ranks.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ranks.done(), drain_s)


def url_of(listening: socket.socket) -> str:
    """Return the URL of a server that listens on `listening`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _recorded(
    plan: Plan | PartsPlan, options: RunOptions, listening: socket.socket
) -> Iterator[None]:
    """Let `rankwright status` and `stop` know of this launch while it runs.

    Not of one inside a job or a pod: there the job is the launch, and it is recorded where it was
    submitted.
    """
    record = None
    if not any(name in os.environ for name in SCHEDULER_VARIABLES):
        record = make_record(plan, options.backend, this_process())
        record = record.model_copy(update={"url": url_of(listening)})
        try:
            write_record(record)
        except OSError as error:
            _say(f"`rankwright status` will not list this launch: {error}")
    try:
        yield
    finally:
        if record is not None:
            remove_record(record.id)


def _say(text: str) -> None:
    print(f"rankwright: {text}", file=sys.stderr, flush=True)
