"""Runs pods as written, without images: a stand-in for kubelet, the pod network and cluster DNS.

Each pod has network, host name, mount and process namespaces of its own, on a bridge that is itself
in a namespace with no way out. The machine's root file system is the image, under an overlay that
is thrown away. Volumes, user, capabilities, read-only root, probes, preStop and the grace period
are applied. Probes come every half second, and preStop is shortened, or a test would take minutes.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.templates.pod_rig.controllers import PodSpec

from rankwright.templates.checks.engine_objects import expanded

ROOT = Path(__file__).parents[3]
PROBE_PERIOD_S = 0.5
PRE_STOP_SHARE = 0.05


def why_not() -> str | None:
    """The reason why pods cannot run here; None if they can."""
    if os.geteuid() != 0:
        return "pods of our own need root: run the tests as root"
    missing = [
        tool for tool in ("ip", "unshare", "nsenter", "setpriv", "curl") if not shutil.which(tool)
    ]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install iproute2 util-linux curl"
    try:
        tried = subprocess.run(
            ["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True
        )
    except OSError as error:
        return f"no namespaces here: {error}"
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode()}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class Pod:
    """One pod. Its states are Waiting, Running, Ready and Exited."""

    made: PodSpec
    ip: str
    namespace: str
    folder: Path
    rig: "PodRig"
    state: str = "Waiting"
    process: "subprocess.Popen[bytes] | None" = None
    liveness_failures: int = 0

    @property
    def container(self) -> dict[str, Any]:
        """The only container."""
        (only,) = self.made.spec["containers"]
        return dict(only)

    @property
    def log(self) -> str:
        """What it wrote so far."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def environment(self) -> dict[str, str]:
        """The container's variables, as kubelet resolves them."""
        found = {"PATH": "/image/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
        for variable in self.container["env"]:
            value = variable.get("value", "")
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                label = re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldRef"]["fieldPath"])
                assert label, source
                value = self.made.labels[label[1]]
            elif "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                value = self.rig.secrets[reference["name"]][reference["key"]]
            found[variable["name"]] = expanded(value, found)
        return found

    def start(self) -> None:
        """Start it; from now on its name resolves."""
        link = f"v{self.namespace}"
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "-n", self.rig.network, "link", "add", link, "type", "veth", "peer", "name",
             "eth0", "netns", self.namespace)  # fmt: skip
        _run("ip", "-n", self.rig.network, "link", "set", link, "master", "pods", "up")
        _run("ip", "-n", self.namespace, "addr", "add", f"{self.ip}/24", "dev", "eth0")
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        _run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        names = [self.made.name]
        if self.made.subdomain:
            short = f"{self.made.name}.{self.made.subdomain}"
            names = [f"{short}.default.svc.cluster.local", f"{short}.default", short, *names]
        with self.rig.hosts.open("a") as hosts:
            hosts.write(f"{self.ip} {' '.join(names)}\n")
        script = self.folder / "start.sh"
        script.write_text(self._script())
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "--pid",
                 "--fork", "--kill-child", "bash", str(script)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.state = "Running"
        threading.Thread(target=self._watch, daemon=True).start()

    def _script(self) -> str:
        top, context = self.folder / "m", self.container["securityContext"]
        lines = [
            "set -e",
            "mount --make-rprivate /",
            f"mkdir {top}; mount -t tmpfs pod {top}; cd {top}; mkdir u w r",
            "mount -t overlay overlay -o lowerdir=/,upperdir=$PWD/u,workdir=$PWD/w r; R=$PWD/r",
            "mkdir -p $R/image/bin",
            f"mount --bind {shlex.quote(str(self.rig.commands))} $R/image/bin",
        ]
        for folder in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
            # An image's Python is for all users; the machine's may be below root's own folder.
            above = " ".join(shlex.quote(f"m/r{parent}") for parent in folder.parents[:-1])
            lines.append(f"mkdir -p $R{folder}; cd {self.folder}; chmod o+x {above}")
            lines.append(f"mount --rbind {shlex.quote(str(folder))} $R{folder}")
        lines += [
            "mount --rbind /dev $R/dev; mount -t proc proc $R/proc",
            f"mount --bind {self.rig.hosts} $R/etc/hosts",
            "echo 'hosts: files' > $R/etc/nsswitch.conf",
            f"hostname {self.made.name}",
        ]
        volumes = {volume["name"]: volume for volume in self.made.spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            lines += self._mount(volumes[mount["name"]], mount)
        if context["readOnlyRootFilesystem"]:
            lines.append("mount -o remount,ro $R")
        lines.append(f"exec chroot $R {shlex.join(self._as_user(self._command()))}")
        return "\n".join(lines)

    def _mount(self, volume: dict[str, Any], mount: dict[str, Any]) -> list[str]:
        place = f"$R{mount['mountPath']}"
        lines = [f"mkdir -p {place}"]
        if "hostPath" in volume:
            lines.append(f"mount --bind {shlex.quote(volume['hostPath']['path'])} {place}")
        else:
            lines.append(f"mount -t tmpfs -o mode=1777,size=2g volume {place}")
        if "configMap" in volume:
            for name, text in self.rig.config_maps[volume["configMap"]["name"]].items():
                lines.append(f"printf %s {shlex.quote(text)} > {place}/{name}")
        if mount.get("readOnly"):
            lines.append(f"mount -o remount,bind,ro {place}")
        return lines

    def _command(self) -> list[str]:
        words = self.container["command"] + self.container.get("args", [])
        words = [expanded(word, self.environment()) for word in words]
        environment = self.environment() | self.rig.extra
        return ["env", "-i", *(f"{k}={v}" for k, v in environment.items()), *words]

    def _as_user(self, command: list[str]) -> list[str]:
        user, context = self.made.spec["securityContext"], self.container["securityContext"]
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["allowPrivilegeEscalation"] is False
        return [
            *("setpriv", f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}"),
            *("--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
            *command,
        ]

    def _first_process(self) -> int | None:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            found = children.read_text().split()
        except OSError:
            return None
        return int(found[0]) if found else None

    def _probe(self, probe: dict[str, Any]) -> bool:
        limit_s = 10
        if "httpGet" in probe:
            (port,) = [
                each["containerPort"]
                for each in self.container["ports"]
                if each["name"] == probe["httpGet"]["port"]
            ]
            return self.rig.fetch(f"http://{self.ip}:{port}{probe['httpGet']['path']}") is not None
        first = self._first_process()
        if first is None:
            return False
        words = probe["exec"]["command"]
        environment = [f"{k}={v}" for k, v in (self.environment() | self.rig.extra).items()]
        inside = ["nsenter", "-t", str(first), "-n", "-u", "-m", "-p", "-r"]
        command = [*inside, *self._as_user(["env", "-i", *environment, *words])]
        try:
            return subprocess.run(command, capture_output=True, timeout=limit_s).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _watch(self) -> None:
        assert self.process is not None
        started = False
        while self.process.poll() is None:
            if not started:
                started = self._probe(self.container["startupProbe"])
            elif self.state == "Running" and self._probe(self.container["readinessProbe"]):
                self.state = "Ready"
            elif self.state == "Ready" and not self._probe(self.container["livenessProbe"]):
                self.liveness_failures += 1
            time.sleep(PROBE_PERIOD_S)
        self.state = "Exited"

    def delete(self) -> int:
        """End it as kubelet does: preStop, TERM to its first process, KILL after the grace period.

        Returns:
            Its exit status; -9 if it had to be killed.
        """
        assert self.process is not None
        sleep_s = self.container["lifecycle"]["preStop"]["sleep"]["seconds"] * PRE_STOP_SHARE
        try:
            return self.process.wait(sleep_s)
        except subprocess.TimeoutExpired:
            pass
        first = self._first_process()
        if first is not None:
            os.kill(first, signal.SIGTERM)
        try:
            return self.process.wait(self.made.spec["terminationGracePeriodSeconds"] - sleep_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return -9


@dataclass
class PodRig:
    """`with PodRig(folder, pods, objects) as rig:` has the pods waiting inside the block."""

    folder: Path
    made: list[PodSpec]
    objects: list[dict[str, Any]]
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict[str, str])  # variables of the image
    pods: list[Pod] = field(default_factory=list)

    def __enter__(self) -> "PodRig":
        self.network = f"rw{os.getpid()}"
        self.commands = self.folder / "commands"
        self.commands.mkdir(parents=True, exist_ok=True)
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.config_maps = {
            item["metadata"]["name"]: item["data"]
            for item in self.objects
            if item["kind"] == "ConfigMap"
        }
        _run("ip", "netns", "add", self.network)
        _run("ip", "-n", self.network, "link", "add", "pods", "type", "bridge")
        _run("ip", "-n", self.network, "addr", "add", "10.233.0.254/24", "dev", "pods")
        _run("ip", "-n", self.network, "link", "set", "pods", "up")
        for number, made in enumerate(self.made):
            folder = self.folder / f"pod{number}"
            folder.mkdir()
            namespace = f"{self.network}p{number}"
            self.pods.append(Pod(made, f"10.233.0.{number + 1}", namespace, folder, self))
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            if pod.process is not None and pod.process.poll() is None:
                os.killpg(pod.process.pid, signal.SIGKILL)
                pod.process.wait()
            subprocess.run(["ip", "netns", "del", pod.namespace], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.network], capture_output=True)

    def fetch(self, url: str, body: str | None = None, timeout_s: float = 60) -> str | None:
        """The answer of `url`, asked from beside the pods; None if there is none."""
        command = ["curl", "--silent", "--fail", "--max-time", str(timeout_s), url]
        if body is not None:
            command += ["--header", "Content-Type: application/json", "--data", body]
        done = subprocess.run(
            ["ip", "netns", "exec", self.network, *command], capture_output=True, text=True
        )
        return done.stdout if done.returncode == 0 else None

    def wait_until(self, state: str, timeout_s: float) -> None:
        """Wait until every pod is in `state`."""
        end = time.monotonic() + timeout_s
        while any(pod.state != state for pod in self.pods):
            ended = any(pod.state == "Exited" for pod in self.pods) and state != "Exited"
            if ended or time.monotonic() > end:
                logs = "\n".join(f"{p.made.name} is {p.state}:\n{p.log[-3000:]}" for p in self.pods)
                raise AssertionError(f"not all pods are {state}:\n{logs}")
            time.sleep(0.1)
