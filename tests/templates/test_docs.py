"""The pages of the targets name every option, and no other."""

import re
from pathlib import Path

import pytest

from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_options import EngineKubernetesOptions
from rankwright.templates.layout import DRAIN_S
from rankwright.templates.options import MAX_KUBERNETES_NAME
from rankwright.templates.render import TARGETS
from rankwright.templates.slurm_job import TERM_LEAD_S

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("target", TARGETS)
def test_the_page_of_a_target_lists_its_options(target: str) -> None:
    page = (DOCS / f"deploy-{'engines' if target in ENGINES else target}.md").read_text()
    table = page.partition("## Options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(rows))) == set(TARGETS[target].options.model_fields)


def test_the_page_lists_the_options_of_engines_on_kubernetes_and_their_images() -> None:
    page = (DOCS / "deploy-engines.md").read_text().partition("## On Kubernetes")[2]
    listed = page.partition("Options are")[2].partition("\n\n")[0]
    options = set(re.findall(r"`([a-z_]+)`", listed)) - {"deployment", "statefulset"}
    assert options - {"leaderworkerset"} == set(EngineKubernetesOptions.model_fields)
    for engine in ENGINES.values():
        assert f"`{engine.image}`" in page


def test_numbers_on_the_pages_are_those_of_the_code() -> None:
    assert f"{TERM_LEAD_S} seconds before the time limit" in (DOCS / "deploy-slurm.md").read_text()
    assert DRAIN_S == 60, "both pages say a minute"
    page = (DOCS / "deploy-kubernetes.md").read_text()
    assert f"{MAX_KUBERNETES_NAME} characters at most" in page


@pytest.mark.parametrize("target", ENGINES)
def test_the_page_names_the_version_whose_flags_were_read(target: str) -> None:
    engine = ENGINES[target]
    page = (DOCS / "deploy-engines.md").read_text()
    assert f"| `{target}` | {engine.title} {engine.version} |" in page
