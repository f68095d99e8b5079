"""The base of every value that crosses a folder's border or is written to a file.

Values are frozen and refuse unknown fields: a misspelt key in a hand-edited file is an error that
names it, never a setting that is silently lost.
"""

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen pydantic model that round-trips through JSON.

    >>> class Point(Value):
    ...     x: int
    >>> Point.model_validate_json(Point(x=1).model_dump_json())
    Point(x=1)
    """

    # Validators are built at first use: a plan needs half of them, and building all of them took a
    # third of the time of `rankwright plan` (1.35 s; 0.9 s so).
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
