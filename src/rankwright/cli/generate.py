"""`rankwright generate`: answer prompts offline."""

import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from rankwright.cli import options
from rankwright.cli.output import print_json, seconds, status
from rankwright.executor.backends.agent import Agent


def run(
    model: options.ModelOrPlan,
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="What to answer; may be repeated.")
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message; needs --chat.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length of an answer at most.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0: the most likely token each time.")
    ] = 0,
    top_k: Annotated[
        int, typer.Option(min=0, metavar="N", help="Sample among the N likeliest; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample among the likeliest, P together.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends an answer; may be repeated.")
    ] = None,
    cluster: options.Cluster = "auto",
    isl: options.InputTokens = 1024,
    objective: options.ObjectiveOption = "latency",
    tp: options.Tp = None,
    pp: options.Pp = None,
    ep: options.Ep = None,
    dp: options.Dp = None,
    backend: options.Backend = "auto",
    load_format: options.LoadFormat = "auto",
    model_path: options.ModelPath = None,
    start_timeout: options.StartTimeout = 1800,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Answer prompts with MODEL or PLAN, offline.

    A model is planned first. The ranks end with the last answer.
    """
    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p:g}")
    options.check_positive("--start-timeout", start_timeout, " s")
    load = options.workload(isl=isl, osl=max_tokens, concurrency=len(prompt), objective=objective)
    streams = len(prompt) == 1 and not as_json
    # It imports PyTorch while we plan.
    with nullcontext() if backend == "ray" else Agent() as agent:
        # Here, not at the top: it takes half of the time until an agent can be started.
        from rankwright.cli.planning import plan_of
        from rankwright.planner.make_plan import Pins

        plan, made_now = plan_of(model, cluster, load, pins=Pins(tp=tp, pp=pp, ep=ep, dp=dp))
        if made_now:
            status(f"{plan.model.name} on {plan.cluster.describe()}: {plan.split.label()}")
        # Here, not at the top: a login node has no rankwright[executor], and `--help` works there.
        from rankwright.executor.generate import generate
        from rankwright.executor.messages import Sampling

        answers = generate(
            plan,
            prompt,
            Sampling(
                temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens
            ),
            chat=chat,
            system=system,
            stops=stop or (),
            on_text=_print_piece if streams else None,
            load_format=load_format,
            model_path=model_path,
            backend=backend,
            start_timeout_s=start_timeout,
            force=force,
            agent=agent,
        )
    if as_json:
        print_json({"split": plan.split.model_dump(), "answers": [asdict(a) for a in answers]})
        return
    if streams:
        print()
    else:
        for text, answer in zip(prompt, answers, strict=True):
            print(f"{text}\n{answer.text}\n")
    tokens = sum(len(answer.token_ids) for answer in answers)
    first_s = min(answer.ttft_s for answer in answers)
    total_s = max(answer.total_s for answer in answers)
    status(f"{tokens} tokens in {seconds(total_s)}, the first after {seconds(first_s)}")


def _print_piece(_: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
