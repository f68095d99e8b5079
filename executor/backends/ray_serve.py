"""A plan as a Ray Serve application, which KubeRay's RayService deploys.

Its import path is `rankwright.executor.backends.ray_serve:app`. The application is one deployment
of one replica: the front end that `launch` runs in its parent. It starts the ranks as actors in a
placement group of its own, as `launch --backend ray` does, and asks Ray for one CPU and no GPU, so
that no GPU is counted twice. Serve does the rest: HTTP, the bounds on requests, and a new replica,
so new ranks, where the health check fails. Ranks end with the replica that started them.
"""

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from rankwright.executor.backends.ray_cluster import make_bundles, nodes
from rankwright.executor.backends.tools import MissingToolError
from rankwright.executor.checkpoint import read_sampling_defaults
from rankwright.executor.metrics import Metrics
from rankwright.executor.preflight import find_model, make_options
from rankwright.executor.progress import Progress
from rankwright.executor.run_options import DeviceKind, LoadFormat, RunOptions
from rankwright.executor.server import create_app, health_status
from rankwright.executor.service import Service
from rankwright.executor.session import LaunchError, start
from rankwright.executor.start_checks import check_start
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_plan
from rankwright.templates.layout import DRAIN_S, END_S
from rankwright.templates.ray_share import FRONT_END_CPUS

try:
    import ray
    from ray import serve
except ImportError as missing:
    raise MissingToolError(
        f"Ray Serve is not installed here ({missing.name or 'ray'} is missing); install it on "
        "every node with: pip install 'rankwright[executor,serve]'"
    ) from None

# A wrong plan or a wrong machine stays wrong: starting for ever would hide it.
_STARTS = 3
_NODES_EVERY_S = 1.0


class Settings(BaseModel):
    """What the `args` of the application say; only `plan` is needed.

    Attributes:
        plan: File with the plan, which every node sees.
        model_path: Folder with the weights, the same on every node; None: found by the name.
        model_name: Name in the API; None: the plan's.
        load_format: 'dummy' makes random weights.
        device: What the ranks compute on; 'auto': what the plan says.
        start_timeout_s: From the start of the application until every replica must be ready.
        drain_s: For running requests when the application ends.
        prefix_cache: Share KV blocks of prompts that begin alike.
        force: Run also where a machine is not the one that the plan was made for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Path
    model_path: Path | None = None
    model_name: str | None = None
    load_format: LoadFormat = "auto"
    device: DeviceKind = "auto"
    start_timeout_s: float = Field(default=1800.0, gt=0)
    drain_s: float = Field(default=DRAIN_S, ge=0)
    prefix_cache: bool = True
    force: bool = False


def app(settings: Settings) -> serve.Application:
    """Return the application of the plan in `settings`, with bounds that follow from its limits.

    Raises:
        ValueError: The file is no plan.
    """
    plan = read_plan(settings.plan)
    num_running = plan.limits.max_num_seqs * plan.split.dp
    make_deployment = serve.deployment(
        name="Server",
        num_replicas=1,  # of the front end; the plan's own replicas are behind it
        # As many as run at once, and as many that wait in the engine for the next free place.
        max_ongoing_requests=2 * num_running,
        # As many again wait at each proxy; more are refused with 503.
        max_queued_requests=2 * num_running,
        graceful_shutdown_timeout_s=settings.drain_s + END_S,
        max_constructor_retry_count=_STARTS,
        ray_actor_options={"num_cpus": FRONT_END_CPUS},
        logging_config={"enable_access_log": False},  # a line a request would be most of the log
    )
    return make_deployment(serve.ingress()(Server)).bind(plan, settings)


class Server:
    """The front end of a plan, as the replica of a Serve deployment."""

    # Serve awaits it, and `__del__`.
    async def __init__(self, plan: Plan, settings: Settings) -> None:  # type: ignore[misc]
        """Start the ranks of `plan`, and return when they take requests.

        Raises:
            ValueError: The model cannot be run or found, or Ray has no such machines.
            LaunchError: A rank failed, or the time is up.
        """
        self._closing = contextlib.AsyncExitStack()
        try:
            await self._start(plan, settings)
        except BaseException:
            await self._closing.aclose()
            raise

    async def _start(self, plan: Plan, settings: Settings) -> None:
        options, tokenizer = find_model(plan, await _options(plan, settings))
        defaults, notes = read_sampling_defaults(options.model_path)
        for note in (*check_start(plan, options), *notes):
            print(f"rankwright: {note}", file=sys.stderr, flush=True)
        self._session = await self._closing.enter_async_context(start(plan, options))
        name = settings.model_name or plan.model.name
        with Progress(plan) as progress:
            await self._session.ready(progress.show)
            progress.ready(f"{name} on Ray Serve")
        front_end = self._session.front_end
        self._service = Service(
            front_end, tokenizer, name, plan.model.vocab_size, defaults, Metrics(front_end)
        )
        self._failure = asyncio.create_task(self._session.failure())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; Serve calls this when the replica is made."""
        return create_app(self._service)

    async def check_health(self) -> None:
        """Raise where only a new replica would help; Serve calls this every ten seconds.

        Raises:
            LaunchError: A rank ended, or a replica says nothing more.
        """
        if self._failure.done():
            raise self._failure.result()
        status = health_status(self._service)
        if status != "ok":
            raise LaunchError(f"the server is {status}")

    async def __del__(self) -> None:
        """End the ranks; Serve calls this once running requests have ended or their time is up."""
        if not self._failure.done():
            self._failure.cancel()
            await self._session.stop()
        await self._closing.aclose()


async def _options(plan: Plan, settings: Settings) -> RunOptions:
    """Return how to run `plan` on the Ray cluster of this process, when it has all the machines.

    Raises:
        ValueError: It has not got them in time; with both counts.
    """
    deadline_s = time.monotonic() + settings.start_timeout_s
    while True:
        try:
            make_bundles(plan, nodes())
            break
        except ValueError:
            # On Kubernetes machines join as their pods start, in any order.
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(_NODES_EVERY_S)
    return make_options(
        plan,
        backend="ray",
        load_format=settings.load_format,
        model_path=settings.model_path,
        device=settings.device,
        host_interface=ray.util.get_node_ip_address(),
        start_timeout_s=max(deadline_s - time.monotonic(), 1.0),
        prefix_cache=settings.prefix_cache,
        force=settings.force,
    )
