"""What a user may say about Kubernetes objects, beyond the plan."""

import re
from typing import Literal

from pydantic import Field, model_validator

from rankwright.templates.layout import PORTS_OF_A_LAUNCH
from rankwright.templates.options import (
    DEFAULT_PORT,
    KUBERNETES_PORT,
    MAX_KUBERNETES_NAME,
    AbsolutePath,
    GpuTypes,
    Image,
    Port,
)
from rankwright.topology.value import Value

# Names as the API server takes them (Kubernetes docs, "Object Names and IDs", "Labels").
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
RESOURCE = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"


class PodOptions(Value):
    """What holds for the pods of every target on Kubernetes."""

    name: str | None = Field(
        default=None,
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=MAX_KUBERNETES_NAME,
        description="a name of lower-case letters, digits and '-', letter first, at most "
        f"{MAX_KUBERNETES_NAME}",
    )
    namespace: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        max_length=63,
        description="a namespace; None: that of the kubectl context",
    )
    image: Image | None = Field(
        default=None,
        description="a container image, such as registry/rankwright:1.0",
    )
    image_pull_secret: str | None = Field(
        default=None, pattern=SUBDOMAIN, max_length=253, description="the name of a secret"
    )
    token_secret: str | None = Field(
        default=None,
        pattern=SUBDOMAIN,
        max_length=253,
        description="the name of a secret whose key `token` becomes HF_TOKEN",
    )
    model_pvc: str | None = Field(
        default=None,
        pattern=SUBDOMAIN,
        max_length=253,
        description="the name of a PersistentVolumeClaim that every node may mount read-only",
    )
    model_host_path: AbsolutePath | None = Field(
        default=None, description="the absolute path of a folder with the weights on every node"
    )
    model_path: AbsolutePath | None = Field(
        default=None,
        description="the absolute path of the weights inside the pod, under /models",
    )
    port: Port = Field(default=DEFAULT_PORT, description="a port from 1024 to 65535 for HTTP")
    gpu_resource: str | None = Field(
        default=None,
        pattern=RESOURCE,
        max_length=128,
        description="an extended resource such as nvidia.com/gpu",
    )
    gpu_types: GpuTypes | None = Field(
        default=None,
        description="the label nvidia.com/gpu.product of each kind of GPU of the plan, such as "
        "h100-sxm=NVIDIA-H100-80GB-HBM3,a10=NVIDIA-A10",
    )
    device_class: str | None = Field(
        default=None,
        pattern=SUBDOMAIN,
        max_length=253,
        description="a DeviceClass to claim GPUs of (DRA), such as gpu.nvidia.com",
    )
    rdma_resource: str | None = Field(
        default=None,
        pattern=RESOURCE,
        max_length=128,
        description="an extended resource such as rdma/ib, of what joins machines",
    )
    rdma_count: int = Field(
        default=1, ge=1, le=64, description="how many of rdma_resource, 1 to 64"
    )
    topology_key: str | None = Field(
        default=None,
        pattern=LABEL_KEY,
        max_length=253,
        description="a node label whose value the machines must share, such as "
        "topology.kubernetes.io/zone",
    )
    node_selector: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*(,[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*)*$",
        description="node labels, such as pool=serving,zone=a",
    )
    queue: str | None = Field(
        default=None,
        pattern=SUBDOMAIN,
        max_length=63,
        description="a LocalQueue of Kueue, which admits all pods of a plan or none",
    )
    monitor: bool = Field(default=False, description="true: a PodMonitor for Prometheus; or false")

    @model_validator(mode="after")
    def _fits_together(self) -> "PodOptions":
        if self.model_pvc is not None and self.model_host_path is not None:
            raise ValueError("give model_pvc or model_host_path, not both")
        for pair in (self.node_selector or "").split(","):
            key, _, value = pair.partition("=")
            if pair and not (re.match(LABEL_KEY, key) and re.match(LABEL_VALUE, value)):
                raise ValueError(f"node_selector has {pair!r}; expected LABEL=VALUE of a node")
        labels = [pair.partition("=")[0] for pair in (self.node_selector or "").split(",")]
        if len(set(labels)) < len(labels):
            raise ValueError(f"node_selector={self.node_selector!r} names a label twice")
        has_volume = self.model_pvc is not None or self.model_host_path is not None
        if self.model_path is not None:
            if not has_volume:
                raise ValueError(
                    f"model_path={self.model_path!r} is inside the pod; say with model_pvc or "
                    "model_host_path which volume holds it"
                )
            if not (self.model_path + "/").startswith("/models/"):
                raise ValueError(
                    f"model_path={self.model_path!r} must be under /models, where the volume is "
                    "mounted"
                )
        if self.port in range(KUBERNETES_PORT, KUBERNETES_PORT + PORTS_OF_A_LAUNCH):
            raise ValueError(
                f"port={self.port} is a port where the ranks meet; expected another, such as "
                f"{DEFAULT_PORT}"
            )
        return self


class KubernetesOptions(PodOptions):
    """Options of `render(plan, "kubernetes", ...)`."""

    flavor: Literal[
        "auto", "deployment", "statefulset", "job", "leaderworkerset", "jobset", "rayservice"
    ] = Field(
        default="auto",
        description="auto, deployment, statefulset, job, leaderworkerset, jobset or rayservice",
    )
    max_replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="how many copies of the plan may run, by the length of their queue",
    )
    queue_length: int = Field(
        default=4, ge=1, le=10**6, description="waiting requests a copy before there is one more"
    )
    prometheus: str | None = Field(
        default=None,
        pattern=r"^https?://[A-Za-z0-9.:/_-]+$",
        description="the address of Prometheus, for KEDA, such as http://prometheus.monitoring:9090",
    )

    @model_validator(mode="after")
    def _scales_by_something(self) -> "KubernetesOptions":
        if self.prometheus is not None and self.max_replicas == 1:
            raise ValueError("prometheus is what max_replicas scales by; give that too")
        return self


class EngineKubernetesOptions(PodOptions):
    """Options of `render(plan, "vllm", on="kubernetes", ...)` and of the other engines."""

    flavor: Literal["auto", "deployment", "statefulset", "leaderworkerset"] = Field(
        default="auto", description="auto, deployment, statefulset or leaderworkerset"
    )
    run_as_user: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="the number of a user other than root; None: the image's own",
    )

    @model_validator(mode="after")
    def _one_user(self) -> "EngineKubernetesOptions":
        if self.run_as_user is not None and self.rdma_resource is not None:
            raise ValueError(
                f"run_as_user={self.run_as_user} cannot lock memory for "
                f"rdma_resource={self.rdma_resource}, which takes root; leave one out"
            )
        return self


class PoolKubernetesOptions(EngineKubernetesOptions):
    """Options of `render(plan, "vllm", on="kubernetes", ...)` for separate pools."""

    router_image: Image | None = Field(
        default=None,
        description="a container image with the router; None: the engine's, into which pip "
        "installs it at the start",
    )

    @model_validator(mode="after")
    def _workers_have_names(self) -> "PoolKubernetesOptions":
        if self.flavor not in ("auto", "statefulset"):
            raise ValueError(
                f"flavor={self.flavor}: the router must know every worker by a name of its own; "
                "use statefulset, or auto"
            )
        if self.queue is not None:
            raise ValueError(
                f"queue={self.queue}: two pools are no one object whose pods it could admit "
                "together; leave it out"
            )
        return self
