#!/usr/bin/env bash
# The images without an engine: their Dockerfiles linted, and their last stages built in bare Debian roots, to show
# that the packages they name suffice.
#
#   tools/extra/images.sh target/release [HADOLINT]        (as root; needs debootstrap)
set -euo pipefail
cd "$(dirname "$0")/../.."
binaries=$1
hadolint=${2:-hadolint}
files=(deploy/docker/coordinator.Dockerfile deploy/docker/worker.Dockerfile)

if command -v "$hadolint" > /dev/null; then
  "$hadolint" "${files[@]}" && echo "hadolint: ok"
else
  echo "SKIPPED: hadolint is not there"
fi
if [ "$(id -u)" -ne 0 ] || ! command -v debootstrap > /dev/null; then
  echo "SKIPPED: bare Debian roots need root and debootstrap"
  exit 0
fi

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase bookworm "$root/base" > "$root/log" 2>&1 || { tail "$root/log"; exit 1; }
as_user() { chroot --userspec=65532:65532 "$@"; }

# distroless/cc has libc and libgcc, as a minimal Debian has.
cp -a "$root/base" "$root/coordinator"
# Built as the image's is: with the Dockerfile's own settings, in a folder of its own.
# shellcheck disable=SC2046
env $(sed -n 's/^ENV //p' "${files[0]}") cargo build --release --locked -p musher-coordinator --target-dir target/image
strip -o "$root/coordinator/usr/bin/musher" target/image/release/musher
as_user "$root/coordinator" musher --version
size=$(stat -c %s "$root/coordinator/usr/bin/musher")
# distroless/cc has some 23 MB.
[ "$size" -lt 26500000 ] || { echo "musher has $size bytes: the image would be above 50 MB"; exit 1; }
echo "coordinator's image: ok, $((size / 1000000)) MB on top of distroless/cc"

mv "$root/base" "$root/worker"
# The packages of the last stage.
packages=$(sed -n '/^FROM debian/,$p' deploy/docker/worker.Dockerfile | sed -n 's/.*--no-install-recommends \(.*\) \\$/\1/p')
# shellcheck disable=SC2086
chroot "$root/worker" sh -c "apt-get update && apt-get install -y --no-install-recommends $packages" > "$root/log" 2>&1 || { tail "$root/log"; exit 1; }
mkdir -p "$root/worker/opt/libtorch/torch"
cp -a "$(realpath .libtorch)/torch/lib" "$root/worker/opt/libtorch/torch/lib"
rm -f "$root/worker/opt/libtorch/torch/lib/libtorch_python.so"
if [ -d .libtorch/nvidia ]; then cp -a "$(realpath .libtorch)/nvidia" "$root/worker/opt/libtorch/nvidia"; fi
strip -o "$root/worker/usr/bin/musher-worker" "$binaries/musher-worker"
# What the image's own build sets as the program's search path.
as_user "$root/worker" env LD_LIBRARY_PATH=/opt/libtorch/torch/lib musher-worker --version
missing=$(as_user "$root/worker" env LD_LIBRARY_PATH=/opt/libtorch/torch/lib ldd /usr/bin/musher-worker | grep 'not found' || true)
[ -z "$missing" ] || { echo "$missing"; exit 1; }
echo "worker's image: ok, with $packages"
