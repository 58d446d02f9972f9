#!/usr/bin/env python3
"""Trains a job's recipe in another program and writes what it says as a run's events, for `musher compare`.

    peer_run.py JOB.toml --peer peer.py --data PETS --seed 1 --out DIR [--python PYTHON]

The peer takes --data, --epochs, --image-size, --batch, --width, --seed and --threads, runs under torchrun as one process
and prints one JSON line an epoch with train_loss, val_loss, val_accuracy and val_miou. It knows no early stopping: the
job's rule, which is Keras' (patience, start_from_epoch), is applied here, and the peer ended when it says so.
"""
import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tomllib

from bench_curves import peer_command


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("job", type=pathlib.Path)
    p.add_argument("--peer", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    a = p.parse_args()
    job = tomllib.loads(a.job.read_text())
    setting = lambda table, key, default: job.get(table, {}).get(key, default)
    epochs = setting("train", "epochs", 30)
    rule = Stopping(setting("early_stopping", "patience", 5), setting("early_stopping", "start_from_epoch", 0))
    command = peer_command(a.python, a.peer, data=a.data, epochs=epochs, image_size=setting("data", "image_size", 224),
                           batch=setting("train", "global_batch", 32), width=setting("model", "width", 1.0), seed=a.seed,
                           threads=a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    with open(a.out / "events.jsonl", "w") as events:
        def tell(event, **fields):
            now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            print(json.dumps({"timestamp": now, "event": event, **fields}), file=events, flush=True)

        tell("run_started")
        peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stopped = None
        for line in peer.stdout:
            if stopped or not line.startswith("{"):
                continue
            said = json.loads(line)
            epoch = said["epoch"]
            tell("epoch_finished", epoch=epoch, train_loss=said["train_loss"])
            tell("validated", epoch=epoch, **{key: value for key, value in said.items() if key.startswith("val_")})
            if rule.stops(epoch, said["val_loss"]):
                stopped = "early"
                peer.terminate()
            elif epoch == epochs:
                stopped = "epoch_limit"
        code = peer.wait()
        if not stopped:
            sys.exit(f"peer_run: the peer ended with code {code} before its {epochs} epochs were over")
        tell("run_finished", status="finished", stopped=stopped, best_epoch=rule.best_epoch)


class Stopping:
    """Keras' EarlyStopping of a loss, with epochs from 1."""

    def __init__(self, patience, start_from_epoch):
        self.patience, self.start_from_epoch = patience, start_from_epoch
        self.best, self.best_epoch, self.wait = float("inf"), None, 0

    def stops(self, epoch, loss):
        if epoch <= self.start_from_epoch:
            return False
        self.wait += 1
        if loss < self.best:
            self.best, self.best_epoch, self.wait = loss, epoch, 0
        return self.wait >= self.patience


if __name__ == "__main__":
    main()
