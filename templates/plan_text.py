"""A plan as text that survives a shell's heredoc and a YAML block unchanged."""

import json
from typing import cast

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan


def plan_text(plan: Plan | PartsPlan | DisaggregatedPlan) -> str:
    r"""Return `plan` as JSON: a line a field, a line a rank or a part, printable ASCII only.

    Short enough to be embedded, and a changed rank is one changed line in a diff. JSON leaves the
    delete character (0x7f) as it is, which YAML forbids; it only occurs inside strings, where
    `\u007f` means the same.
    """
    fields: dict[str, object] = json.loads(plan.model_dump_json())
    lines: list[str] = []
    for name, value in fields.items():
        if isinstance(value, list) and name in ("ranks", "parts"):
            rows = ",\n".join("  " + json.dumps(rank) for rank in cast("list[object]", value))
            lines.append(f' "{name}": [\n{rows}\n ]')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    return text.replace("\x7f", "\\u007f")
