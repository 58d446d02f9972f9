#!/usr/bin/env bash
# Shows that the simulation can fail: applies each of tests/mutants/N-name.patch to a copy of the sources and
# expects that invariant N catches it. Prints a table; exits with 1 if one gets away.
#
#   tools/mutants.sh [PATCH...]      SEEDS=20000 by default
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=${SEEDS:-20000}
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/mutants
copy=$target/sources
mkdir -p "$copy"
unset CARGO_TARGET_DIR

# Only what differs, so that the build stays warm.
git ls-files -co --exclude-standard | while read -r file; do
    [ -f "$file" ] || continue
    cmp -s "$file" "$copy/$file" && continue
    mkdir -p "$copy/$(dirname "$file")"
    cp "$file" "$copy/$file"
done

build() {
    (cd "$copy" && cargo build --release --locked --quiet --target-dir "$target/build" -p musher-tests \
        --bin simulate 2>"$target/build.log") || { cat "$target/build.log" && exit 1; }
}

# The invariants that fail, and in how many seeds.
judge() {
    { "$target/build/release/simulate" --seeds "0..$seeds" --keep 0 || true; } |
        sed -n 's/^invariant \([0-9]\): \([0-9]*\) seeds failed$/\1: \2/p' | paste -sd, | sed 's/,/, /g'
}

patches=("$@")
[ $# -gt 0 ] || patches=(tests/mutants/*.patch)
escaped=0
printf '%-46s %-9s %s\n' mutant caught 'seeds that fail, by invariant'
build
found=$(judge)
printf '%-46s %-9s %s\n' 'none' - "${found:-none}"
for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    expected=${name%%-*}
    if ! patch -d "$copy" -p1 -F3 -s --no-backup-if-mismatch <"$patch"; then
        printf '%-46s does not apply: the code that it changes has moved on\n' "$name"
        exit 1
    fi
    build
    found=$(judge)
    patch -d "$copy" -p1 -F3 -s -R --no-backup-if-mismatch <"$patch"
    if grep -q "\b$expected: " <<<"$found"; then caught=yes; else caught=no && escaped=1; fi
    printf '%-46s %-9s %s\n' "$name" "$caught" "${found:-none}"
done
exit $escaped
