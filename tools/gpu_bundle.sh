#!/usr/bin/env bash
# Packs the checks of GPU_CHECKS.md for a machine that has an NVIDIA GPU and a Python with torch 2.11, but no Rust:
# programs without debug information, scripts, and `run.sh`, which finds libtorch and NCCL where that Python has them.
#
#   tools/gpu_bundle.sh OUT.tar.xz        here; builds what is missing
#   tar xf OUT.tar.xz && gpu/run.sh tools/gpu_checks.py --jobs 4       there; or tools/bench_gpu.py, bin/examples/...
set -euo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_bundle.sh OUT.tar.xz}")
cd "$(dirname "$0")/.."

make build
cargo build --release --locked -p musher-model -p musher-nccl -p musher-worker --examples
team=$(cargo test --release --locked -p musher-worker --test team --no-run 2>&1 | grep -o 'target/release/deps/team-[0-9a-f]*')

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/gpu/bin/examples" "$scratch/gpu/tools" "$scratch/gpu/worker/tests"
cp target/release/musher target/release/musher-worker "$scratch/gpu/bin/"
cp "$team" "$scratch/gpu/bin/team"
for example in device_parity nccl_check step_rate data_rate overlap; do
  cp "target/release/examples/$example" "$scratch/gpu/bin/examples/"
done
strip "$scratch"/gpu/bin/musher* "$scratch/gpu/bin/team" "$scratch"/gpu/bin/examples/*
cp tools/gpu_checks.py tools/bench_gpu.py "$scratch/gpu/tools/"
cp -r worker/tests/reference "$scratch/gpu/worker/tests/"
cat >"$scratch/gpu/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs a script of tools/ with this folder's programs, or a program, against the libtorch of `python3`.
set -euo pipefail
what=${1:?usage: run.sh tools/gpu_checks.py|tools/bench_gpu.py|bin/... [ARGUMENTS]}
shift
here=$(dirname "$(realpath "$0")")
site=$(python3 -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
libraries=$site/torch/lib$(printf ':%s' "$site"/nvidia/*/lib)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} CARGO_MANIFEST_DIR=$here/worker PYTHONUNBUFFERED=1
case $what in
  tools/gpu_checks.py) exec python3 "$here/$what" --bin "$here/bin" --tests "$here/bin/team" "$@" ;;
  tools/*) exec python3 "$here/$what" --bin "$here/bin" "$@" ;;
  *) exec "$here/$what" "$@" ;;
esac
RUN
chmod +x "$scratch/gpu/run.sh"
tar cJf "$out" -C "$scratch" gpu
echo "$out: $(du -h "$out" | cut -f1)"
