"""The executor in rendered pods, run as written in namespaces: a completion over two of them.

The default flavor on every run; all of them where `RANKWRIGHT_ALL_FLAVORS=1`, half a minute each.
"""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan, two_nodes
from tests.executor.tiny_tokenizer import write_tokenizer
from tests.templates.pod_rig.image import EXECUTOR, image_rig
from tests.templates.pod_rig.rig import why_not

from rankwright.cost_model.read_model import read_model

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ALL = os.environ.get("RANKWRIGHT_ALL_FLAVORS") == "1"
FLAVORS = ["statefulset", "job", "leaderworkerset", "jobset"]


@pytest.mark.parametrize("flavor", FLAVORS if ALL else FLAVORS[:1])
def test_the_executor_serves_over_two_pods_and_answers_what_runs_when_they_end(
    flavor: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    folder = write_tokenizer(references["llama"].folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)  # pods run as a user of their own
    made = two_nodes(cpu_plan(read_model(folder), pp=2))
    options = {"flavor": flavor, "model_host_path": str(folder)}
    with image_rig(tmp_path, made, EXECUTOR, **options) as pods:
        head, worker = pods.pods
        worker.start()
        time.sleep(1)
        head.start()
        pods.wait_until("Ready", 200)
        url = f"http://{head.ip}:8000/v1/completions"
        body = {"prompt": [5, 17, 42, 99, 7], "max_tokens": 12, "temperature": 0}
        answer = json.loads(pods.fetch(url, json.dumps({**body, "ignore_eos": True})) or "null")
        assert answer["usage"]["completion_tokens"] == 12

        # What runs when the pods are deleted is answered in full.
        answers: list[str | None] = []
        long = json.dumps({**body, "max_tokens": 200, "ignore_eos": True})
        request = threading.Thread(target=lambda: answers.append(pods.fetch(url, long)))
        request.start()
        codes: list[int] = []
        ends = [
            threading.Thread(target=lambda p=pod: codes.append(p.delete()))  # type: ignore[misc]
            for pod in pods.pods
        ]
        for end in ends:
            end.start()
        for end in [*ends, request]:
            end.join()
        assert json.loads(answers[0] or "null")["usage"]["completion_tokens"] == 200
        assert codes == [0, 0], [pod.log[-2000:] for pod in pods.pods]
