"""What every check shares: how a difference is said, and facts of a plan that all compare with."""

import functools
import re

from pydantic import TypeAdapter

from rankwright.planner.parts_plan import OwnPlan

_OWN_PLAN: TypeAdapter[OwnPlan] = TypeAdapter(OwnPlan)


class ManifestMismatchError(AssertionError):
    """A rendered file does not say what the plan says: a fault of ours, never of the user."""


def expect(what: str, found: object, expected: object) -> None:
    """Raise unless `found` is `expected`.

    Raises:
        ManifestMismatchError: It is not.
    """
    if found != expected:
        raise ManifestMismatchError(f"{what}: rendered {found!r}, the plan says {expected!r}")


def expect_plan(plan: OwnPlan, text: str) -> None:
    """Raise unless `text` is `plan` as JSON."""
    # Both through JSON: a plan built in Python may hold a subclass or -0.0 that compares otherwise.
    if _normal(text) != plan.model_dump_json():
        raise ManifestMismatchError("the embedded plan.json is not the plan")


@functools.lru_cache(maxsize=2)
def _normal(text: str) -> str:
    """Return a plan's JSON as the plan itself would write it."""
    return _OWN_PLAN.validate_json(text).model_dump_json()


def ranks_by_node(plan: OwnPlan) -> list[int]:
    """Return how many ranks each machine holds, in the order of their first rank.

    That is how launchers number them.
    """
    return [len(plan.ranks_of_node(n)) for n in dict.fromkeys(rank.node for rank in plan.ranks)]


def is_cpu(plan: OwnPlan) -> bool:
    """Return whether the plan is for CPUs."""
    first = plan.ranks[0]
    gpus = {gpu.index: gpu for gpu in plan.cluster.node(first.node).gpus}
    return gpus[first.gpu].device == "cpu"


def variables(plan: OwnPlan) -> dict[str, str]:
    """Return the environment of the plan."""
    return {variable.name: variable.value for variable in plan.environment}


def shell_words(line: str) -> list[str]:
    r"""Return the words of a shell line that are bare or in double quotes, as bash reads them.

    `shlex` leaves the backslash before a dollar or a backquote.

    >>> shell_words('--a "x \\$y" b')
    ['--a', 'x $y', 'b']
    """
    words: list[str] = []
    for quoted, bare in re.findall(r'"((?:\\.|[^"\\])*)"|([^\s"]+)', line):
        words.append(bare or re.sub(r'\\([\\"$`])', r"\1", quoted))
    return words


def exported(script: str) -> dict[str, str]:
    r"""Return what a shell script exports by `export NAME=WORD` lines.

    >>> exported("export A=\"x \\$y\"\n  export B=1\nexport C\n")
    {'A': 'x $y', 'B': '1'}
    """
    found: dict[str, str] = {}
    for name, word in re.findall(r"^ *export ([A-Za-z_]\w*)=(.*)$", script, re.MULTILINE):
        if name in found:
            raise ManifestMismatchError(f"{name} is exported twice")
        words = shell_words(word)
        found[name] = words[0] if words else ""
    return found


def heredoc(script: str, word: str) -> str:
    """Return the text of the heredoc that ends with `word`."""
    _, _, rest = script.partition(f"<<'{word}'\n")
    text, end, _ = ("\n" + rest).partition(f"\n{word}\n")
    if not end:
        raise ManifestMismatchError(f"no heredoc {word}")
    return text[1:] + "\n"
