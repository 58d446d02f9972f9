"""A small live run to look at, and how runs are looked at, for the scripts beside this one."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import tempfile
import time

JOB = """
name = "demo"
data.root = "data"
data.image_size = 64
model.width = 0.0625
train.global_batch = 8
train.epochs = 500
early_stopping.patience = 500
cluster.device = "cpu"
cluster.regroup_window_s = 0.2
server.grpc = "127.0.0.1:0"
server.http = "127.0.0.1:0"
"""


def waited(what, look, patience_s=60):
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.1)
    raise SystemExit(f"no {what} within {patience_s} s")


def events_in(file, name=None):
    """The whole lines of an `events.jsonl`, which need not be there yet."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if name in (None, event["event"])]


class Run:
    def __init__(self, place, process):
        self.place, self.process = place, process

    def events(self, name=None):
        return events_in(self.place / "runs/demo/events.jsonl", name)

    def wait_for(self, name, times=1):
        waited(f"{name} x {times}", lambda: len(self.events(name)) >= times)
        return self.events(name)[times - 1]

    def workers(self):
        return subprocess.check_output(["pgrep", "-P", str(self.process.pid), "musher-worker"], text=True).split()


@contextlib.contextmanager
def launched(binaries, workers=2, job=JOB):
    """`musher launch` of a job on drawn data, until the block's end."""
    musher = pathlib.Path(binaries).resolve() / "musher"
    place = pathlib.Path(tempfile.mkdtemp())
    process = None
    try:
        draw = [musher, "data", "synth", "data", "--train", "80", "--val", "16"]
        subprocess.run(draw, cwd=place, check=True, stdout=subprocess.DEVNULL)
        (place / "job.toml").write_text(job)
        start = [musher, "launch", "job.toml", "--workers", str(workers), "--threads", "1"]
        process = subprocess.Popen(start, cwd=place, stderr=open(place / "log", "w"))
        yield Run(place, process)
    finally:
        if process:
            process.terminate()
            process.wait()
        shutil.rmtree(place)
