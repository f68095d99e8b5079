"""Reads what a probe on another machine printed as JSON: a cluster, or its error."""

import json

from pydantic import ValidationError

from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError


def parse_message(text: str, where: str, said: str = "") -> Cluster:
    """Return the cluster of one machine, named `where` if that is a name (without a blank).

    Args:
        text: What it printed.
        where: Its name, or words that say which machine it is.
        said: What it printed beside it, for the message.

    Raises:
        ProbeError: It could not read itself, with its own reason, or printed no cluster.
    """
    try:
        if text.lstrip().startswith('{"error"'):
            error: dict[str, str] = json.loads(text)["error"]
            raise ProbeError(error["class"], f"{where}: {error['message']}")
        cluster = Cluster.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as problem:
        detail = " ".join((said or text).split())[-300:] or "it said nothing"
        if isinstance(problem, ValidationError):
            detail = f"it sent {problem.errors()[0]['msg']!r}; is another version installed there?"
        raise ProbeError(
            "gather_failed",
            f"{where} was not read: {detail}; run `rankwright probe` there to see why",
        ) from None
    if " " in where:
        return cluster
    node = cluster.nodes[0].model_copy(update={"name": where})
    return cluster.model_copy(update={"nodes": (node, *cluster.nodes[1:])})
