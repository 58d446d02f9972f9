#!/usr/bin/env bash
# Puts libtorch into .libtorch: lean (CPU, 1.3 GB) on a machine without an NVIDIA driver, full (CUDA and
# NCCL, 4.5 GB) with one. MUSHER_LIBTORCH=lean|full overrides. Does nothing when it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.11.0 # tch 0.24 goes with this one exactly
variant=${MUSHER_LIBTORCH:-lean}
if [ -z "${MUSHER_LIBTORCH:-}" ] && [ -e /proc/driver/nvidia/version ]; then variant=full; fi
stamp="$torch $variant"
if [ "$(cat .libtorch/stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi

missing=()
command -v cargo >/dev/null || missing+=("Rust (rustup.rs)")
command -v python3 >/dev/null || missing+=("python3")
python3 -m pip --version >/dev/null 2>&1 || missing+=("python3-pip")
command -v g++ >/dev/null || missing+=("g++")
if [ ${#missing[@]} -gt 0 ]; then
  printf 'setup: missing %s; on Debian or Ubuntu: apt install python3 python3-pip g++\n' "${missing[*]}" >&2
  exit 2
fi

echo "setup: installing libtorch $torch ($variant) into .libtorch"
rm -rf .libtorch
pip=(python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --target .libtorch)
case $variant in
  lean) "${pip[@]}" --no-deps "torch==$torch" "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cupti==13.0.*" ;;
  full) "${pip[@]}" "torch==$torch" ;;
  *) echo "setup: MUSHER_LIBTORCH is '$variant', not lean or full" >&2; exit 2 ;;
esac
echo "$stamp" > .libtorch/stamp
