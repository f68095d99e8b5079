"""Rendered pods run as written, in namespaces: what the manifest says is what happens.

A stand-in takes the executor's place here; the executor itself runs in
`tests/executor/test_kubernetes_pods.py`.
"""

import threading
import time
from pathlib import Path

import pytest
from tests.templates.plans import cpu_plan
from tests.templates.pod_rig.image import image_rig
from tests.templates.pod_rig.rig import why_not

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

SEVERAL = ["statefulset", "job", "leaderworkerset", "jobset"]

# A launcher that serves /health on the head and drains, and says how it was started.
STAND_IN = """\
#!{python}
import http.server, os, signal, sys, threading
words = " ".join(sys.argv).replace("=", " ").split()
args = dict(zip(words, words[1:]))
print("launched", *sys.argv[1:], flush=True)
print("pid", os.getpid(), "uid", os.getuid(), flush=True)
open("/tmp/writable", "w").close()
for path in ("/not-writable", "/etc/rankwright/x"):
    try:
        open(path, "w")
        print("WROTE", path, flush=True)
    except OSError:
        pass
def end(*_):
    print("drained", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
if args.get("--node-rank", "0") == "0":
    http.server.ThreadingHTTPServer(("0.0.0.0", int(args["--port"])), Health).serve_forever()
threading.Event().wait()
"""


@pytest.mark.parametrize("flavor", SEVERAL)
def test_pods_of_every_flavor_find_their_head_and_drain(flavor: str, tmp_path: Path) -> None:
    with image_rig(tmp_path, cpu_plan(), STAND_IN, flavor=flavor) as pods:
        head, worker = pods.pods
        worker.start()
        time.sleep(1.5)
        assert "launched" not in worker.log, "it waits for its head's name"
        head.start()
        pods.wait_until("Ready", 60)
        for number, pod in enumerate(pods.pods):
            assert f"--nnodes 2 --node-rank {number} --master-addr" in pod.log
            assert "pid 1 uid 10001" in pod.log, "the launcher gets TERM, and is not root"
            assert "WROTE" not in pod.log
            assert pod.liveness_failures == 0
        codes: dict[str, int] = {}
        ends = [
            threading.Thread(target=lambda p=pod: codes.update({p.made.name: p.delete()}))  # type: ignore[misc]
            for pod in pods.pods
        ]
        for end in ends:
            end.start()
        for end in ends:
            end.join()
        assert set(codes.values()) == {0}, codes
        assert "drained" in head.log


def test_a_single_pod_serves_and_drains(tmp_path: Path) -> None:
    with image_rig(tmp_path, cpu_plan((2,)), STAND_IN) as pods:
        (pod,) = pods.pods
        pod.start()
        pods.wait_until("Ready", 60)
        assert pod.delete() == 0
        assert "drained" in pod.log
