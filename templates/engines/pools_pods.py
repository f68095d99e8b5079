"""Separate pools on Kubernetes: the objects of each pool, and a router with a Service in front.

A worker is a StatefulSet of one replica, or one for its head and one for the rest, because the
router names every worker: a Service over a pool would hand a prompt's cache to whom did not ask.
"""

import hashlib

from rankwright import __version__
from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.plan import Plan
from rankwright.templates.engines.engine import Engine
from rankwright.templates.engines.pods import (
    MOUNT,
    engine_objects,
)
from rankwright.templates.engines.pool_engine import POOL_ENGINES, Role
from rankwright.templates.engines.render_engine import (
    config_text,
)
from rankwright.templates.engines.render_pools import (
    ROUTER_FILE,
    Pool,
    engine_pools,
    pool_shares,
    router_config,
)
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.fill import fill
from rankwright.templates.kubernetes_objects import (
    KUBERNETES_FILE,
    startup_failures,
)
from rankwright.templates.kubernetes_options import PoolKubernetesOptions
from rankwright.templates.layout import start_budget_s
from rankwright.templates.options import default_name

# `NAME-prefill-99-head` must not be longer than 52, as `MAX_KUBERNETES_NAME` explains.
_MOST_NAME = 52 - len("-prefill-99-head")
_KIND = "statefulset"


def pools_kubernetes_files(
    plan: DisaggregatedPlan, options: PoolKubernetesOptions, *, target: str
) -> dict[str, str]:
    """Return the objects of both pools and of the router, as one YAML file, by file name.

    Raises:
        ValueError: The engine cannot express a part of the plan.
    """
    engine, pools = ENGINES[target], engine_pools(plan, target)
    name = _name(plan, options)
    failures = startup_failures(pool_shares(plan, any_gpus=True))
    parts = [
        _pool_objects(pool, options, target, name, failures).rstrip("\n") + "\n" for pool in pools
    ]
    parts.append("---\n" + _router(plan, options, target, name, pools, failures))
    title = (
        f"# {engine.title} {engine.version} with separate pools for prefill and decode: "
        f"{plan.label()}.\n"
    )
    return {KUBERNETES_FILE: title + "\n".join(parts)}


def _name(plan: DisaggregatedPlan, options: PoolKubernetesOptions) -> str:
    name = options.name or default_name(plan.prefill)
    if len(name) <= _MOST_NAME:
        return name
    if options.name is not None:
        raise ValueError(
            f"name={name!r} has {len(name)} characters; expected at most {_MOST_NAME}, since names "
            "of workers are longer"
        )
    end = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _MOST_NAME - 9].rstrip('-')}-{end}"


def _pool_objects(
    pool: Pool, options: PoolKubernetesOptions, target: str, whole: str, failures: int
) -> str:
    engine, extra, role = ENGINES[target], POOL_ENGINES[target], pool.role
    other = "decode" if role == "prefill" else "prefill"
    addresses = [key for key, value in extra.side_variables if value == "$address"]
    files = engine_objects(
        pool.plan,
        options,
        f"{whole}-{role}",
        target=target,
        flavor=_KIND,
        config=_config(engine, pool.plan, role, target),
        failures=failures,
        role=role,
        flags=extra.flags.get(role, ()),
        peers=(f"{whole}-{other}",),
        address_variable=addresses[0] if addresses else None,
    )
    return files[KUBERNETES_FILE]


def _config(engine: Engine, plan: Plan, role: Role, target: str) -> str | None:
    extra = POOL_ENGINES[target]
    if engine.config is None or extra.config is None:
        return None
    return config_text(engine, plan, engine.config(plan) | extra.config(role, plan))


def worker_host(name: str, role: str, number: int) -> str:
    """Return the name by which worker `number` of a pool is found."""
    return f"{name}-{role}-{number}-head-0.{name}-{role}-nodes"


def _router(
    plan: DisaggregatedPlan,
    options: PoolKubernetesOptions,
    target: str,
    name: str,
    pools: tuple[Pool, ...],
    failures: int,
) -> str:
    engine, extra = ENGINES[target], POOL_ENGINES[target]
    start_s = start_budget_s(pool_shares(plan, any_gpus=True))
    hosts = {
        worker: worker_host(name, pool.role, number)
        for pool in pools
        for number, (worker, _) in enumerate(pool.workers)
    }
    words: list[str] = []
    config = None
    if extra.config is not None:
        config = router_config(engine, pools, options.port, hosts)
        words += ["-c", f"{MOUNT}/{ROUTER_FILE}", "-t", str(start_s)]
    else:
        words += ["--host", "0.0.0.0", "--port", str(options.port)]
        words += ["--worker-startup-timeout-secs", str(start_s)]
        for pool in pools:
            for worker, _ in pool.workers:
                words += [f"--{pool.role}", f"http://{hosts[worker]}:{options.port}"]
                if extra.url_has_side_port and pool.role == "prefill":
                    words.append(str(extra.usual_side_port))
    return fill(
        "engines/router.yaml.j2",
        version=__version__,
        app=f"{target}-router",
        name=name,
        namespace=options.namespace,
        queue=None,
        image=options.router_image or options.image or engine.image,
        package=None if options.router_image else extra.router_package,
        image_pull_secret=options.image_pull_secret,
        run_as_user=options.run_as_user,
        command=extra.router,
        words=words,
        port=options.port,
        mount=MOUNT,
        config_name=None
        if config is None
        else f"{name}-router-{hashlib.sha256(config.encode()).hexdigest()[:8]}",
        config_file=ROUTER_FILE,
        config=config,
        node_selector=(),
        startup_failures=failures,
    )
