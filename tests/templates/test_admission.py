"""Every flavor before rules that were fitted to a real API server, beyond schemas.

`kcheck.py` lies beside the CRDs (crd_schemas.py) and is no part of this repository. It makes the
pods that controllers would make, and knows what the server and the webhooks of LeaderWorkerSet and
JobSet refuse: of 6,762 changed manifests that it was not made with, it let 6 pass that Kubernetes
1.36.2 refused. Where it is missing, schemas alone judge (test_kubernetes_flavors.py).
"""

import copy
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tests.templates.crd_schemas import crds_folder, keep_schemas
from tests.templates.every_way import files_of, ways
from tests.templates.plans import cpu_plan, plan
from tests.templates.random_plans import random_plan
from tests.templates.test_kubernetes_flavors import EXTRAS

from rankwright.templates.kubernetes_flavors import FLAVORS
from rankwright.templates.render import render

FILE = "rankwright.yaml"
NUM_PLANS = int(os.environ.get("RANKWRIGHT_ADMITTED", "8"))  # random ones, in every way
Judge = Callable[[str], list[tuple[str, str, str]]]  # YAML: what is wrong, as kind, place, words


@pytest.fixture(scope="module")
def judge() -> Judge:
    """What a server of 1.34 and one of 1.37 would say."""
    pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    folder = crds_folder()
    script = folder and folder.parent / "kcheck.py"
    if script is None or not script.exists():
        pytest.skip("no kcheck.py beside the CRDs here")
    keep_schemas()
    made = importlib.util.spec_from_file_location("kcheck", script)
    assert made is not None
    assert made.loader is not None
    module: Any = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    checker = module.Checker(("1.34", "1.37"), folder)

    def judged(text: str) -> list[tuple[str, str, str]]:
        checker.err.clear()
        checker.check_text(text)
        return list(checker.err)

    return judged


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_server_admits_every_flavor(judge: Judge, flavor: str, extras: str) -> None:
    counts = (8, 8) if 2 in FLAVORS[flavor].num_nodes else (8,)
    options = {"flavor": flavor, "image": "x.io/y:1", **EXTRAS[extras]}
    made = plan(counts, tp=8, pp=1)
    assert judge(render(made, "kubernetes", None, **options)[FILE]) == []
    if extras == "plain":
        made = cpu_plan((2,) * len(counts))
        assert judge(render(made, "kubernetes", None, **options)[FILE]) == []


@pytest.mark.parametrize("flavor", ["deployment", "leaderworkerset"])
@pytest.mark.parametrize("prometheus", [{}, {"prometheus": "http://prometheus:9090"}])
def test_a_server_admits_what_scales(judge: Judge, flavor: str, prometheus: dict[str, str]) -> None:
    made = plan((8,), tp=8, pp=1)
    files = render(made, "kubernetes", None, flavor=flavor, max_replicas=3, **prometheus)
    assert judge(files[FILE]) == []


def test_a_server_admits_random_plans_of_every_engine(judge: Judge) -> None:
    seen = set[str]()
    for seed in range(NUM_PLANS):
        made = random_plan(seed)
        for target, on, options in ways(seed, made):
            if "kubernetes" not in (target, on):
                continue
            files = files_of(made, target, on, options)
            if files is not None:
                assert judge(files[FILE]) == [], (seed, target, options)
                seen.add(f"{target} {options['flavor']}")
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        ("StatefulSet", "metadata.name", "x" * 53, "over 52 characters"),
        ("StatefulSet", "spec.selector.matchLabels.a", "b", "does not match the template"),
        ("StatefulSet", "spec.template.spec.enableServiceLinks", True, "enableServiceLinks"),
        ("StatefulSet", "spec.template.spec.terminationGracePeriodSeconds", 5, "preStop sleep"),
        ("StatefulSet", "spec.template.spec.volumes", [], "has no volume"),
        ("Service", "metadata.name", "1x", "not a valid DNS name"),
        ("PodDisruptionBudget", "spec.minAvailable", 1, "exclude each other"),
        ("ConfigMap", "data.a/b", "x", "bad key"),
    ],
)
def test_it_would_refuse(judge: Judge, kind: str, path: str, value: object, words: str) -> None:
    documents = list(yaml.safe_load_all(render(plan(), "kubernetes")[FILE]))
    item = copy.deepcopy(next(each for each in documents if each["kind"] == kind))
    place, names = item, path.split(".")
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    assert any(words in said for _, _, said in judge(yaml.safe_dump(item)))
