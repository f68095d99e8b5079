"""Texts that a shell, YAML or a template could take for more than data."""

from hypothesis import strategies as st

MARK = "executed-by-mistake"  # a file that a payload makes where it is executed
ATTACKS = [
    f"$(touch {MARK})",
    f"`touch {MARK}`",
    f"; touch {MARK} #",
    f"'; touch {MARK}; '",
    f'"; touch {MARK}; "',
    f"\\$(touch {MARK})",
    f'\\"; touch {MARK}; \\"',
    f"\ntouch {MARK}\n",
    f"\n#SBATCH --nodes=9\ntouch {MARK}\n",
    f"\nRANKWRIGHT_PLAN\ntouch {MARK}\n",
    f"\nRANKWRIGHT_VLLM\ntouch {MARK}\n",
    f"| touch {MARK}",
    f"${{IFS}}$(touch${{IFS}}{MARK})",
    f"x]; touch {MARK}; [",
    f"a=$(touch {MARK})",
    f"x[$(touch {MARK})]",
    "{{ 7 * 7 }}{% raw %}",
    "\n---\nkind: Secret\n",
    "- a: &b [*b]",
    '", "command": ["sh"]',
    "!!python/object/apply:os.system ['true']",
    ": #\t%@|>",
    "\x00\x1b[2J\u2028\x85",
    "../../../etc",
    "~root$HOME*?",
    "$(HOME)$$(HOME)",
    "-e",
    "--config=x",
]
odd = st.one_of(
    st.sampled_from(ATTACKS),
    st.tuples(st.sampled_from(["", "/", "a", "/m/", "x/"]), st.sampled_from(ATTACKS)).map("".join),
    st.text(max_size=12),
    st.text(alphabet="a/-.$`\"'\\;&|<>(){}[]*?!#~ \n\t:,=@%", min_size=1, max_size=24),
)


def printable(text: str) -> str:
    """`text` without what no field takes, so that fewer cases end with the first look."""
    return "".join(char for char in text if char.isprintable())
