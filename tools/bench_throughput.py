#!/usr/bin/env python3
"""Images per second of the whole job (decoding and augmentation included): Musher and PyTorch DDP, interleaved.

bench_throughput.py --data PETS --peer peer_ddp.py [--python PYTHON] [--repeats 5] [--case SIZE:BATCH:STEPS ...]
                    [--width W] [--bf16]

A case is image size, batch per rank and steps per measurement; 2 processes of one thread each, width 1.0 unless
--width. The peer runs under torchrun and prints one JSON line with images_per_s (of its median step, after three
steps to warm up). Musher trains two epochs of STEPS steps; the second epoch's mean rate counts, its start included.
Prints a Markdown table with medians and the ratio of each pair of runs.
"""
import argparse, json, os, pathlib, shutil, statistics, subprocess, sys, tempfile

from bench_curves import peer_command

ROOT = pathlib.Path(__file__).resolve().parent.parent


def peer(a, size, batch, steps):
    command = peer_command(a.python, a.peer, a.workers, data=a.data, steps=steps, image_size=size, batch=batch, width=a.width, threads=1)
    command += ["--amp"] * a.bf16
    out = subprocess.run(command + a.peer_args.split(), capture_output=True, text=True, check=True).stdout
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])["images_per_s"]


def musher(a, size, batch, steps):
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        root = scratch / "pets"
        (root / "annotations").mkdir(parents=True)
        source = pathlib.Path(a.data).resolve()
        (root / "images").symlink_to(source / "images")
        (root / "annotations/trimaps").symlink_to(source / "annotations/trimaps")
        names = [l for l in (source / "annotations/trainval.txt").read_text().splitlines() if l and not l.startswith("#")]
        count = steps * batch * a.workers
        if count > len(names):
            sys.exit(f"{count} samples are asked for, the data set has {len(names)}: take fewer steps")
        (root / "annotations/trainval.txt").write_text("\n".join(names[:count]) + "\n")
        (root / "annotations/test.txt").write_text("\n".join(names[:2]) + "\n")
        (scratch / "job.toml").write_text('name = "bench"\n')
        settings = {"data.root": json.dumps(str(root)), "data.image_size": size, "model.width": a.width,
                    "train.global_batch": batch * a.workers, "train.epochs": 2, "early_stopping.start_from_epoch": 9,
                    "train.precision": '"bf16"' if a.bf16 else '"fp32"', "checkpoint.every_epochs": 0, "server.grpc": '"127.0.0.1:0"', "server.http": '"127.0.0.1:0"'}
        command = [ROOT / "target/release/musher", "launch", scratch / "job.toml", "--workers", a.workers, "--run-dir", scratch / "run",
                   "--log-format", "json"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run([str(c) for c in command], check=True, stderr=subprocess.DEVNULL)
        events = [json.loads(line) for line in (scratch / "run/events.jsonl").read_text().splitlines()]
        return [e["images_per_second"] for e in events if e["event"] == "epoch_finished"][-1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True); p.add_argument("--peer", required=True); p.add_argument("--python", default=sys.executable)
    p.add_argument("--repeats", type=int, default=5); p.add_argument("--width", type=float, default=1.0)
    p.add_argument("--workers", type=int, default=2); p.add_argument("--peer-args", default="")
    p.add_argument("--bf16", action="store_true", help="autocast on both sides")
    p.add_argument("--case", action="append", metavar="SIZE:BATCH:STEPS")
    a = p.parse_args()
    print("| image | batch a rank | PyTorch DDP | Musher | Musher / PyTorch (min .. max) |\n| --- | --- | --- | --- | --- |", flush=True)
    for case in a.case or ["64:8:10", "224:4:5"]:
        size, batch, steps = map(int, case.split(":"))
        pairs = [(peer(a, size, batch, steps), musher(a, size, batch, steps)) for _ in range(a.repeats)]
        theirs, ours = (statistics.median(side) for side in zip(*pairs))
        ratios = [ours / theirs for theirs, ours in pairs]
        print(f"| {size} | {batch} | {theirs:.2f} | {ours:.2f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) |", flush=True)


if __name__ == "__main__":
    main()
