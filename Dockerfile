# docker build --target cpu --tag rwkv-peft .     for machines without a GPU
# docker build --target cuda --tag rwkv-peft .    for NVIDIA GPUs; --build-arg TORCH=cu126 for those below 7.5
#
# Versions and hashes are those of requirements.lock, but of torch, whose builds differ. It runs as user 1000: a mounted
# folder has to be writable for that user, or take `--user "$(id -u):$(id -g)"`. Kernels are compiled on first use, by g++
# for CPUs, by torch's own NVRTC for GPUs: keep /home/rwkv/.cache in a volume, so that it happens once.
FROM python:3.13.15-slim-trixie@sha256:ffb752e139c0a19692a43af8d8523b274222dd68eebad5d583b45c2201c6e30a AS base
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 rwkv && install --directory --owner rwkv /work
WORKDIR /opt/rwkv-peft
ENV UV_NO_CACHE=1 UV_SYSTEM_PYTHON=1 UV_CONSTRAINT=requirements.lock UV_BUILD_CONSTRAINT=requirements.lock
COPY requirements.txt requirements.lock ./
RUN sed -n '/^uv==/,/[^\\]$/p' requirements.lock >uv.txt && \
    pip install --no-cache-dir --no-deps --require-hashes --requirement uv.txt && rm uv.txt

FROM base AS cpu
RUN uv pip install --torch-backend cpu --requirement requirements.txt
COPY . .
RUN uv pip install --no-deps --editable .
USER 1000
WORKDIR /work
CMD ["rwkv-peft", "doctor"]

FROM base AS cuda
ARG TORCH=cu130
RUN uv pip install --torch-backend "$TORCH" --requirement requirements.txt
COPY . .
RUN uv pip install --no-deps --editable .
USER 1000
WORKDIR /work
CMD ["rwkv-peft", "doctor"]
