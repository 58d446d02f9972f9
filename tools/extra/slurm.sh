#!/usr/bin/env bash
# The Slurm script with stand-ins for Slurm's two commands: a signal before the time limit saves, ends with 75 and
# requeues; the next start goes on from there.
#
#   tools/extra/slurm.sh target/release
set -euo pipefail
binaries=$(realpath "$1")
script=$(realpath "$(dirname "$0")/../../deploy/slurm/musher.sbatch")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

mkdir bin
cat > bin/scontrol <<'STAND_IN'
#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> "$SLURM_SUBMIT_DIR/asked"; fi
STAND_IN
cat > bin/srun <<'STAND_IN'
#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
STAND_IN
chmod +x bin/*
"$binaries/musher" data synth data --train 40 --val 8 > /dev/null
cat > job.toml <<'JOB'
name = "queued"
data.root = "data"
data.image_size = 64
model.width = 0.0625
train.global_batch = 8
train.epochs = 1000
early_stopping.patience = 1000
cluster.device = "cpu"
server.http = "127.0.0.1:0"
JOB
export PATH="$place/bin:$PATH" MUSHER="$binaries/musher" MUSHER_WORKER="$binaries/musher-worker"
export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here SLURM_JOB_ID=42 SLURM_SUBMIT_DIR="$place"
MUSHER_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MUSHER_PORT

events=runs/queued/events.jsonl
checkpoints() { if [ -e "$events" ]; then grep -c '"event":"checkpoint_committed"' "$events" || true; else echo 0; fi; }
for life in 1 2; do
  before=$(checkpoints)
  "$script" job.toml 2> "log-$life" &
  job=$!
  for _ in $(seq 600); do
    if [ "$(checkpoints)" -gt "$before" ]; then break; fi
    kill -0 "$job" 2> /dev/null || { cat "log-$life"; exit 1; }
    sleep 0.1
  done
  kill -USR1 "$job"
  wait "$job" && code=0 || code=$?
  [ "$code" -eq 75 ] || { echo "ended with $code, not 75"; cat "log-$life"; exit 1; }
  [ "$(grep -c 'requeue 42' asked)" -eq "$life" ] || { echo "not requeued"; exit 1; }
done
grep '"event":"run_started"' "$events" | tail -n 1 | grep -q '"resumed_from":"e' || { echo "began anew"; exit 1; }
if compgen -G '.musher-*' > /dev/null; then echo "tokens were left behind"; exit 1; fi
echo "slurm: ok"
