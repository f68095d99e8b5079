# The image of the executor, for Kubernetes and for Slurm with pyxis or Apptainer:
#   docker build --tag registry.example.com/rankwright:0.1.0 .
# For KubeRay it needs Ray too: --build-arg EXTRAS=executor,serve
# Another base needs Debian's apt and Python 3.11 or later: --build-arg BASE=...
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# Triton compiles its launchers with gcc when a kernel first runs; pods wait for names with getent,
# which libc-bin has. Versions are those of the base image's Debian.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=executor
COPY . /src
RUN pip install --no-cache-dir "/src[${EXTRAS}]" \
    && rm -rf /src

# The user of the rendered pods. Its home is a volume there, since the root is read-only.
RUN useradd --uid 10001 --create-home --home-dir /cache rankwright
USER 10001
WORKDIR /cache
ENV HOME=/cache \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

CMD ["rankwright", "--help"]
