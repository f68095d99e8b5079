"""Fills a `.j2` file: nothing undefined passes, and every value is quoted for where it lands."""

import json
import re

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("rankwright.templates", ""),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # shell and YAML, not HTML: the filters below quote
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def comment(text: str) -> str:
    r"""Return `text` on one line, so that it cannot end the comment it stands in.

    >>> comment("a\nb\x07")
    'a b?'
    """
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in line)


def shell_word(text: str) -> str:
    r"""Return `text` as one word of a POSIX shell. Quoted always: a bare `A==b` misleads readers.

    >>> print(shell_word("a $b"))
    "a \$b"
    """
    return '"' + re.sub(r'[\\"$`]', r"\\\g<0>", text) + '"'


def shell_bare(text: str) -> str:
    """Return `text` as one shell word, quoted only if it needs to be.

    >>> print(shell_bare("--tp"), shell_bare("a b"))
    --tp "a b"
    """
    return text if re.fullmatch(r"[A-Za-z0-9_@%+:,./-]+", text) else shell_word(text)


def yaml_string(text: str) -> str:
    """Return printable `text` as a YAML double-quoted scalar; JSON's is one.

    Raises:
        ValueError: `text` has a control character, which YAML would refuse or fold.
    """
    if not text.isprintable():
        raise ValueError(f"{text!r} has a control character; expected printable text")
    return json.dumps(text, ensure_ascii=False)


def container_string(text: str) -> str:
    """Return `text` as a YAML scalar that stays as it is in a container's command or environment.

    Kubernetes puts variables in place of `$(NAME)` there, and one dollar in place of two.

    >>> print(container_string("a $(HOME)"))
    "a $$(HOME)"
    """
    return yaml_string(text.replace("$", "$$"))


_ENVIRONMENT.filters |= {  # pyright: ignore[reportUnknownMemberType] (jinja2 leaves the type open)
    "comment": comment,
    "container": container_string,
    "shell": shell_word,
    "shell_bare": shell_bare,
    "yaml": yaml_string,
}


def fill(template: str, **values: object) -> str:
    """Return the file `template` with `values` in place.

    Raises:
        jinja2.UndefinedError: The template names a value that is not given.
    """
    return _ENVIRONMENT.get_template(template).render(**values)
