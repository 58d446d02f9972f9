#!/usr/bin/env python3
"""Validation curves of Musher and of the same recipe in PyTorch, several seeds each, on the same data.

bench_curves.py --data PETS --peer peer_ddp.py [--python PYTHON] [--epochs 20] [--seeds 3] [--out DIR]

The peer is a script that takes --data, --epochs, --image-size, --batch, --width and --seed, runs under torchrun and
prints one JSON line an epoch with val_loss, val_accuracy and val_miou. PYTHON has torch, torchvision, albumentations
and OpenCV. Prints a Markdown table: by epoch the range over the seeds of each side.
"""
import argparse, json, os, pathlib, shutil, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def peer_command(python, script, processes=1, **options):
    """How the recipe is trained in PyTorch."""
    words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, script]
    for key, value in options.items():
        words += ["--" + key.replace("_", "-"), value]
    return [str(word) for word in words]


def peer(a, seed):
    command = peer_command(a.python, a.peer, data=a.data, epochs=a.epochs, image_size=a.image_size, batch=a.batch, width=a.width,
                           seed=seed, threads=a.threads)
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def musher(a, seed, workers):
    run = a.out / f"musher-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    job = a.out / "job.toml"
    job.write_text('name = "curve"\n')
    settings = {"seed": seed, "data.root": json.dumps(str(pathlib.Path(a.data).resolve())), "data.image_size": a.image_size,
                "model.width": a.width, "train.global_batch": a.batch, "train.epochs": a.epochs,
                "early_stopping.patience": a.epochs, "checkpoint.every_epochs": a.epochs, "checkpoint.keep": 1,
                "server.grpc": '"127.0.0.1:0"', "server.http": '"127.0.0.1:0"'}
    command = [ROOT / "target/release/musher", "launch", job, "--workers", str(workers), "--run-dir", run, "--log-format", "json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run([str(c) for c in command], check=True, stderr=subprocess.DEVNULL)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in events if e["event"] == "validated"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True); p.add_argument("--peer", required=True); p.add_argument("--python", default=sys.executable)
    p.add_argument("--epochs", type=int, default=20); p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--image-size", type=int, default=64); p.add_argument("--batch", type=int, default=8)
    p.add_argument("--width", type=float, default=0.25); p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--workers", type=int, default=1); p.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/curves")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    curves = {"pytorch": [], "musher": []}
    for seed in range(a.seeds):
        curves["pytorch"].append(peer(a, seed))
        curves["musher"].append(musher(a, seed, a.workers))
        (a.out / "curves.json").write_text(json.dumps(curves))
    print("| epoch | val_loss PyTorch | val_loss Musher | accuracy PyTorch | accuracy Musher |\n| --- | --- | --- | --- | --- |")
    spread = lambda side, key, e: [run[e][key] for run in curves[side]]
    show = lambda values: f"{min(values):.3f} .. {max(values):.3f}"
    for e in range(a.epochs):
        row = [show(spread(side, key, e)) for key in ("val_loss", "val_accuracy") for side in ("pytorch", "musher")]
        print(f"| {e + 1} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
