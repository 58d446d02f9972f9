#!/usr/bin/env bash
# The checks that need more than Rust and libtorch: a browser, foreign clients, package managers. Each says what
# it skipped and why; one that fails fails the whole.
#
# Python packages come from $MUSHER_EXTRA_PYTHON, or a private environment that is made here.
set -euo pipefail
cd "$(dirname "$0")/../.."

binaries=${CARGO_TARGET_DIR:-target}/release
packages=(playwright prometheus-client grpcio grpcio-health-checking grpcio-reflection pyyaml kubernetes-validate)
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
  check "metrics, health and reflection by foreign clients" "$python" tools/extra/clients.py "$binaries"
fi

printf '\n==== make test-extra: %d failed, %d skipped\n' "${#failed[@]}" "${#skipped[@]}"
if [ ${#skipped[@]} -gt 0 ]; then printf 'skipped: %s\n' "${skipped[@]}"; fi
if [ ${#failed[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failed[@]}"; exit 1; fi
