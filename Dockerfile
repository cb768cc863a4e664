# docker build --target cpu --tag rwkv-peft .     for machines without a GPU
# docker build --target cuda --tag rwkv-peft .    for NVIDIA GPUs
#
# Kernels are compiled on first use: by g++ for CPUs, by torch's own NVRTC for GPUs. Keep /root/.cache in a volume, so
# that a new container need not compile them again.
FROM python:3.13-slim AS base
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rwkv-peft
ENV PIP_NO_CACHE_DIR=1
COPY requirements.txt ./

FROM base AS cpu
RUN pip install "torch>=2.6,<3" --index-url https://download.pytorch.org/whl/cpu && pip install --requirement requirements.txt
COPY . .
RUN pip install --no-deps --editable .
WORKDIR /work
CMD ["rwkv-peft", "doctor"]

FROM base AS cuda
RUN pip install --requirement requirements.txt
COPY . .
RUN pip install --no-deps --editable .
WORKDIR /work
CMD ["rwkv-peft", "doctor"]
