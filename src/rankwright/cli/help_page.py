"""Makes `docs/cli.md` out of the commands' own help: `python -m rankwright.cli.help_page`."""

import contextlib
import io
import os
import sys

from rankwright.cli import COMMANDS, main

_INTRO = """\
# Command line

Made by `python -m rankwright.cli.help_page > docs/cli.md`; a test checks that it is true.

`--json` prints a command's result as JSON; an error is then `{"error": {"class", "message"}}` on
stdout beside the line on stderr. Exit codes: 0 done; 2 wrong usage or input; 3 no feasible plan; 4
hardware or probe failure; 5 launch or run failure. `rankwright --install-completion` teaches your
shell the commands. `RANKWRIGHT_DEBUG=1` shows where an error came from.
"""


def help_page() -> str:
    """Return the page."""
    pages = [_INTRO]
    for arguments in ([], *([name] for name in COMMANDS)):
        title = " ".join(["rankwright", *arguments])
        pages.append(f"## {title}\n\n```\n{_help(arguments)}```\n")
    return "\n".join(pages)


def _help(arguments: list[str]) -> str:
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # the same on every terminal
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            main([*arguments, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(help_page())
