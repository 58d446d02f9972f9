#!/usr/bin/env bash
# Trains the same job from scratch and from a pretrained encoder, frozen and not, for each seed, and draws all runs
# beside each other. Goes on where it was interrupted; runs that are finished are not repeated.
#
#   tools/compare.sh            settings are variables of the environment:
#     BIN=target/release  JOB=jobs/small.toml  DATA=data/synth  WORKERS=2  OUT=runs/compare
#     SEEDS="44"                one run of each kind for each
#     KINDS="scratch pretrained frozen"     and frozen-scratch: an encoder that stays as it was drawn; and peer: the same
#                               recipe from scratch in another program (see tools/peer_run.py), which then needs
#     PEER=  PYTHON=python3     its script, and a Python that can run it
#     WEIGHTS=                  a file or name for model.pretrained; empty: an encoder pretrained here, on
#     TASK=species EPOCHS=30    this task of the same training images (musher-worker pretrain)
#     ARGS=                     more for `musher launch`, such as "--set train.epochs=10"
#
# Writes OUT/compare.png, compare.html, compare.txt (the table) and compare.json (its figures, a run an object).
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-target/release} JOB=${JOB:-jobs/small.toml} DATA=${DATA:-data/synth} WORKERS=${WORKERS:-2}
OUT=${OUT:-runs/compare} SEEDS=${SEEDS:-44} KINDS=${KINDS:-scratch pretrained frozen}
WEIGHTS=${WEIGHTS:-} TASK=${TASK:-species} EPOCHS=${EPOCHS:-30} ARGS=${ARGS:-}
PEER=${PEER:-} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

# The encoder that a seed's runs start from.
weights() {
  local seed=$1 file="$OUT/$TASK-$1.safetensors"
  if [ -n "$WEIGHTS" ]; then echo "$WEIGHTS" && return; fi
  if [ ! -e "$file" ]; then
    "$BIN/musher-worker" pretrain "$JOB" --task "$TASK" --epochs "$EPOCHS" --set "data.root=$DATA" \
      --set "seed=$seed" --out "$file.part" >"$file.log" # a picture's defects are told on stderr
    mv "$file.part" "$file"
  fi
  echo "$file"
}

train() {
  local kind=$1 seed=$2 run="$OUT/$1-$2" keys=()
  if grep -q '"event": *"run_finished".*"status": *"finished"' "$run/events.jsonl" 2>/dev/null; then return; fi
  case $kind in
    scratch) ;;
    pretrained) keys=(--set "model.pretrained=$(weights "$seed")") ;;
    frozen) keys=(--set "model.pretrained=$(weights "$seed")" --set model.freeze_encoder=true) ;;
    frozen-scratch) keys=(--set model.freeze_encoder=true) ;;
    peer) tools/peer_run.py "$JOB" --peer "$PEER" --python "$PYTHON" --data "$DATA" --seed "$seed" --out "$run"; return ;;
    *) echo "compare: there is no kind $kind; scratch, pretrained, frozen, frozen-scratch and peer are known" >&2; exit 2 ;;
  esac
  if [ -e "$run/state.json" ]; then keys+=(--resume); fi
  # shellcheck disable=SC2086 # ARGS are several words
  "$BIN/musher" launch "$JOB" --workers "$WORKERS" --run-dir "$run" --set "name=$kind" --set "seed=$seed" \
    --set "data.root=$DATA" --set server.grpc=127.0.0.1:0 --set server.http=127.0.0.1:0 "${keys[@]}" $ARGS
}

runs=()
for kind in $KINDS; do
  for seed in $SEEDS; do
    train "$kind" "$seed"
    runs+=("$kind=$OUT/$kind-$seed")
  done
done
"$BIN/musher" compare "${runs[@]}" --out "$OUT" --json >"$OUT/compare.json" 2>/dev/null
"$BIN/musher" compare "${runs[@]}" --out "$OUT" | tee "$OUT/compare.txt"
