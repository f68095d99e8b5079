"""Well-known models, so that planning works without a network.

The facts are rows of `data/known_models.json`: the keys of each published `config.json` that decide
shapes and number formats, the published number of parameters, and where both come from.
"""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import cast

_FILE = Path(__file__).parent / "data" / "known_models.json"


class _Rows(Mapping[str, Mapping[str, object]]):
    """The rows by id, read from the file on first use."""

    def __getitem__(self, name: str) -> Mapping[str, object]:
        return _rows()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_rows())

    def __len__(self) -> int:
        return len(_rows())


KNOWN_MODELS: Mapping[str, Mapping[str, object]] = _Rows()


@cache
def _rows() -> dict[str, dict[str, object]]:
    """Return each id and alias with its row: `config`, and perhaps `parameters` and its source.

    A row that is `like` another holds the keys that differ; the other stands above it.
    """
    stored = json.loads(_FILE.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, object]] = {}
    for row in stored["models"]:
        if "like" in row:
            row["config"] = cast("dict[str, object]", rows[row["like"]]["config"]) | row["config"]
        for name in row["ids"]:
            if name in rows:
                raise ValueError(f"{_FILE.name} has two rows for {name}")
            rows[name] = row
    return rows


def known_config(name: str) -> tuple[str, dict[str, object]]:
    """Return the full id and the config keys of the known model `name`; case does not matter.

    Raises:
        ValueError: it is not in the table; the message names the nearest ids.
    """
    rows = _rows()
    by_lower = {known.lower(): known for known in rows}
    # A bare model name is unambiguous where one organisation only published it.
    by_lower |= {known.lower().split("/")[-1]: known for known in rows}
    found = by_lower.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), by_lower, n=6, cutoff=0.3)
        nearest = list(dict.fromkeys(by_lower[match] for match in near))[:3]
        hint = f"nearest known ids: {', '.join(nearest)}" if nearest else f"{len(rows)} ids known"
        raise ValueError(
            f"model {name!r} is neither a known id nor a local path; {hint}; "
            "a local folder with a config.json works too"
        )
    return found, dict(cast("Mapping[str, object]", rows[found]["config"]))
