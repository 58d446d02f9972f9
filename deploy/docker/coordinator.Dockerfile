# syntax=docker/dockerfile:1
# The coordinator: the command `musher`, without libtorch. Just under 50 MB.
#
#   docker build -f deploy/docker/coordinator.Dockerfile -t musher-coordinator .

FROM rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
# A seventh smaller, for twice the time.
ENV CARGO_PROFILE_RELEASE_LTO=thin CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked -p musher-coordinator \
    && strip -o /musher target/release/musher

# libc, libgcc and certificates; no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /musher /usr/bin/musher
# All that it writes is in the run directory, which is a volume: the root file system may be read-only.
WORKDIR /var/lib/musher
USER 65532:65532
EXPOSE 7400 7401 7402
ENTRYPOINT ["/usr/bin/musher"]
