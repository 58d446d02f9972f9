# syntax=docker/dockerfile:1
# A node's workers, for CPUs (the default) or for NVIDIA GPUs:
#
#   docker build -f deploy/docker/worker.Dockerfile -t musher-worker:cpu .
#   docker build -f deploy/docker/worker.Dockerfile -t musher-worker:cuda --build-arg VARIANT=full .
#
# The GPU's driver comes from the host (580 or newer); CUDA's and NCCL's libraries come with libtorch, so both
# start from the same small base.

ARG VARIANT=lean

FROM rust:1.95.0-bookworm AS build
ARG VARIANT
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY tools/setup.sh tools/setup.sh
RUN MUSHER_LIBTORCH="$VARIANT" tools/setup.sh
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    RUSTFLAGS="-C link-arg=-Wl,-rpath,/opt/libtorch/torch/lib" \
    cargo build --release --locked -p musher-worker \
    && strip -o /musher-worker target/release/musher-worker
# What a worker opens, and nothing of Python's.
RUN mkdir -p /opt/libtorch/torch \
    && cp -a .libtorch/torch/lib /opt/libtorch/torch/lib \
    && rm -f /opt/libtorch/torch/lib/libtorch_python.so \
    && if [ -d .libtorch/nvidia ]; then cp -a .libtorch/nvidia /opt/libtorch/nvidia; fi

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgcc-s1 libgomp1 libstdc++6 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/libtorch /opt/libtorch
COPY --from=build /musher-worker /usr/bin/musher-worker
# What the container runtime gives the container of the host's driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["/usr/bin/musher-worker"]
