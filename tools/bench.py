#!/usr/bin/env python3
"""All benchmarks in one run of bounded time: a table of ratios with their spread.

bench.py --data PETS [--peer peer_ddp.py --python PYTHON] [--minutes 14] [--only NAME ...] [--append]

Each row holds Musher against something measured in turn with it: PyTorch on the same machine, or its own like (a step
without the control word, half as many workers). Parts run by turns until the time is used up, each at least once, so
that the machine's drift meets all of them; what is shown is the median of the pairs' ratios, the least and the most.
Without --peer and --python, which `bench_throughput.py` describes, what needs PyTorch is left out and said so.
--append adds the table to BENCHMARKS.md. `make bench` builds first, and takes PETS, PEER and PYTHON from the
environment.
"""
import argparse, datetime, json, os, pathlib, platform, re, statistics, subprocess, sys, tempfile, time
from types import SimpleNamespace

import bench_data, bench_recovery, bench_throughput

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"


def said(*command):
    """What a program prints."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()[-500:]}")
    return done.stdout


def numbers(pattern, text):
    return [float(number) for number in re.search(pattern, text).groups()]


# Each part returns rows: what, beside what, the unit, the other's figure, Musher's. A ratio is Musher's over the other's.

def whole_job(a, size, batch, steps, bf16=False):
    b = SimpleNamespace(**vars(a), workers=2, width=1.0, bf16=bf16, peer_args="")
    beside, own = bench_throughput.peer(b, size, batch, steps), bench_throughput.musher(b, size, batch, steps)
    return [(f"whole job, {size} pixels, {'bf16' if bf16 else 'fp32'}, 2 workers", "PyTorch DDP", "images/s", beside, own)]


def data(a, size):
    b = SimpleNamespace(core="0")
    peer = [a.python, bench_data.__file__, "--measure-peer", "--data", a.data, "--size", size, "--epochs", 1]
    theirs, ours = bench_data.pinned(b, peer), bench_data.pinned(b, [BIN / "examples/rate", a.data, size, 1])
    return [(f"data, {size} pixels: {label.split(';')[0]}", label.split(";")[-1].strip() if ";" in label else "albumentations, OpenCV",
             "samples/s of CPU time", theirs[their], ours[own]) for label, own, their in bench_data.ROWS]


def fault_tolerance(a):
    bare, whole = numbers(r"([\d.]+) ms\D+([\d.]+)", said(BIN / "examples/fault_tolerance_cost", 2, 0.25, 64, 4, 6))
    return [("a step with fault tolerance", "without", "ms", bare, whole)]


def overlap(a):
    after, alongside = numbers(r"after ([\d.]+) ms, alongside ([\d.]+)", said(BIN / "examples/overlap", 2, 0.25, 64, 4, 4, 2000))
    return [("a step, sums alongside backward, 2 Gbit/s", "sums after it", "ms", after, alongside)]


def recovery(a):
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as theirs:
        options = SimpleNamespace(bin=BIN, data=a.data, peer=a.peer, python=a.python)
        own = bench_recovery.kill(options, pathlib.Path(own))
        theirs = bench_recovery.torchrun(options, pathlib.Path(theirs))
    return [("a worker is killed: until the next step", "torchrun", "s", theirs["seconds"], own["seconds"])]


def job(a, scratch, settings):
    """The small job on the real data; returns its events and when it was started."""
    settings = {"data.root": str(pathlib.Path(a.data).resolve()), "server.grpc": "127.0.0.1:0", "server.http": "127.0.0.1:0", **settings}
    command = [BIN / "musher", "launch", ROOT / "jobs/small.toml", "--workers", 2, "--run-dir", scratch / "run", "--log-format", "json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    began = time.time()
    said(*command)
    return [json.loads(line) for line in (scratch / "run/events.jsonl").read_text().splitlines()], began


def moment(event):
    return datetime.datetime.fromisoformat(event["timestamp"].replace("Z", "+00:00")).timestamp()


def checkpoint(a):
    with tempfile.TemporaryDirectory() as scratch:
        events, began = job(a, pathlib.Path(scratch), {"train.epochs": 3, "checkpoint.every_epochs": 1})
    stalls = [e["stall_ms"] for e in events if e["event"] == "checkpoint_committed"]
    rates = [e["images_per_second"] for e in events if e["event"] == "epoch_finished"]
    step_ms = 8 / statistics.median(rates) * 1e3
    first = next(e for e in events if e["event"] == "epoch_started")
    return [("a checkpoint's stall", "a step", "ms", step_ms, statistics.median(stalls)),
            ("`musher launch` until the first step begins", "2 s", "s", 2.0, moment(first) - began)]


def crowd(a):
    rows = {}
    for workers in (1000, 2000):
        for line in said(BIN / "crowd", workers, "--steady", 3).splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if cells[0] == str(workers):
                rows.setdefault(cells[1], []).append(float(re.search(r"[\d.]+", cells[-1]).group()))
    units = {"steady, share of a core": "%", "memory, most": "MiB"}
    return [(f"coordinator, 2,000 workers: {what}", "1,000 workers", units.get(what, "CPU s"), *pair) for what, pair in rows.items()]


PARTS = {  # name: (needs PyTorch, what runs)
    "job64": (True, lambda a: whole_job(a, 64, 8, 10)),
    "job64_bf16": (True, lambda a: whole_job(a, 64, 8, 10, bf16=True)),
    "data64": (True, lambda a: data(a, 64)),
    "fault_tolerance": (False, fault_tolerance),
    "checkpoint": (False, checkpoint),
    "overlap": (False, overlap),
    "crowd": (False, crowd),
    "recovery": (True, recovery),
    "data224": (True, lambda a: data(a, 224)),
    "job224": (True, lambda a: whole_job(a, 224, 4, 4)),
    "job224_bf16": (True, lambda a: whole_job(a, 224, 4, 4, bf16=True)),
}


def table(rows):
    yield "| what | beside | unit | beside's | Musher's | ratio (least .. most) | runs |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (what, beside, unit), pairs in rows.items():
        theirs, ours = (statistics.median(side) for side in zip(*pairs))
        ratios = [own / other for other, own in pairs if other] or [float("nan")]
        yield (f"| {what} | {beside} | {unit} | {theirs:.4g} | {ours:.4g} | {statistics.median(ratios):.3g} "
               f"({min(ratios):.3g} .. {max(ratios):.3g}) | {len(pairs)} |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True); p.add_argument("--peer"); p.add_argument("--python"); p.add_argument("--minutes", type=float, default=14)
    p.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS)); p.add_argument("--append", action="store_true")
    a = p.parse_args()
    a.data = str(pathlib.Path(a.data).resolve())
    left_out = [name for name in a.only if PARTS[name][0] and not (a.peer and a.python)]
    parts = [name for name in a.only if name not in left_out]
    if left_out:
        print(f"left out, as they need --peer and --python: {', '.join(left_out)}", file=sys.stderr)
    end, took, rows = time.monotonic() + a.minutes * 60, {}, {}
    while True:
        fits = lambda name: name not in took or time.monotonic() + 1.2 * took[name] < end
        if not any(map(fits, parts)):
            break
        for name in filter(fits, list(parts)):
            started = time.monotonic()
            try:
                for what, beside, unit, theirs, ours in PARTS[name][1](a):
                    rows.setdefault((what, beside, unit), []).append((theirs, ours))
            except (Exception, SystemExit) as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                parts = [part for part in parts if part != name]
            took[name] = time.monotonic() - started
            print(f"{name}: {took[name]:.0f} s", file=sys.stderr, flush=True)
    lines = list(table(rows))
    print("\n".join(lines))
    if a.append:
        with open(ROOT / "BENCHMARKS.md", "a") as file:
            head = f"## All at once, {datetime.date.today()}\n\n`make bench`, {os.cpu_count()} cores, {platform.machine()}\n\n"
            file.write("\n" + head + "\n".join(lines) + "\n")
    if len(parts) + len(left_out) < len(a.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
