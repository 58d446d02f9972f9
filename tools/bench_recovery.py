#!/usr/bin/env python3
"""How long a fault holds the team up, and what it costs: Musher's own recovery, beside torchrun's.

bench_recovery.py --data PETS --peer PEER_DDP_PY --python PYTHON [--repeats 10] [--faults kill,join]

Four workers of one thread, the small model (width 0.25, 64 pixels, global batch 8). Times come from the workers' own
lines about each applied step (RUST_LOG=musher_worker=debug), in seconds:

  kill         SIGKILL of a worker -> the next step that the survivors apply
  stop         SIGSTOP of a worker -> the next step that the survivors apply, less cluster.heartbeat_timeout_s
  join         a worker's process is started -> the first step with it; and the longest pause of the others then
  coordinator  kill -9 of the coordinator, started again at once -> its next answer; and the workers' longest pause
  torchrun     SIGKILL of one of four DDP ranks -> the next step; and the steps that are taken again

"lost" counts applied steps that had to be taken again. A pause is the longest gap between two steps, less the median.
"""
import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

HEARTBEAT_S = 2.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer", help="the DDP script; without it torchrun is left out")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--faults", help="only these, for example kill,join")
    options = parser.parse_args()
    kinds = {"kill": kill, "stop": stop, "join": join, "coordinator": coordinator}
    if options.peer:
        kinds["torchrun"] = torchrun
    if options.faults:
        kinds = {name: kinds[name] for name in options.faults.split(",")}
    figures = {name: [] for name in kinds}
    for repeat in range(options.repeats):
        for name, measure in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                figures[name].append(measure(options, Path(folder)))
            print(repeat + 1, name, {k: round(v, 3) for k, v in figures[name][-1].items()}, file=sys.stderr, flush=True)
    print("| fault | figure | median | least .. most |")
    print("| --- | --- | --- | --- |")
    for name, runs in figures.items():
        for figure in runs[0]:
            values = [run[figure] for run in runs]
            print(f"| {name} | {figure} | {statistics.median(values):.3f} | {min(values):.3f} .. {max(values):.3f} |")


class Worker:
    """One worker process and the steps it has applied."""

    def __init__(self, team, name):
        environment = dict(os.environ, RUST_LOG="musher_worker=debug")
        command = [team.bin / "musher-worker", "join", team.url, "--name", name, "--threads", "1", "--log-format", "json"]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.steps = []  # (time, generation, step)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("message") == "step applied":
                moment = datetime.fromisoformat(record["timestamp"].replace("Z", "+00:00")).timestamp()
                self.steps.append((moment, record["generation"], record["step"]))

    def generation(self):
        return self.steps[-1][1] if self.steps else 0


class Team:
    def __init__(self, options, folder, workers=4):
        self.bin, self.folder = Path(options.bin).resolve(), folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = {
            "data.root": str(Path(options.data).resolve()), "data.image_size": 64, "model.width": 0.25,
            "train.global_batch": 8, "train.epochs": 1000, "cluster.workers": workers,
            "cluster.heartbeat_timeout_s": HEARTBEAT_S, "early_stopping.patience": 1000,
            "checkpoint.every_epochs": 0, "server.grpc": f"127.0.0.1:{port}", "server.http": "127.0.0.1:0",
        }
        job = folder / "job.toml"
        job.write_text('name = "recovery"\n')
        self.command = [self.bin / "musher", "serve", job, "--run-dir", folder / "run", "--log-format", "json"]
        for key, value in settings.items():
            self.command += ["--set", f"{key}={json.dumps(value)}"]
        self.serve()
        self.workers = [Worker(self, f"w{index}") for index in range(workers)]
        self.await_steps(self.workers, 8)

    def serve(self, *more):
        self.coordinator = subprocess.Popen([*self.command, *more], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def await_steps(self, workers, count, beyond=0):
        """Until each has applied `count` steps in a generation above `beyond`."""
        deadline = time.time() + 120
        while not all(sum(1 for s in w.steps if s[1] > beyond) >= count for w in workers):
            if time.time() > deadline:
                raise SystemExit("the team did not go on within 120 s")
            time.sleep(0.01)

    def end(self):
        for process in [self.coordinator, *(worker.process for worker in self.workers)]:
            process.kill()
            process.wait()


def next_step(survivors, after, beyond):
    return min(s[0] for w in survivors for s in w.steps if s[1] > beyond and s[0] > after)


def lost(workers, beyond):
    """Applied steps before the fault that a later generation applied again."""
    before = max(s[2] for w in workers for s in w.steps if s[1] <= beyond)
    first = min(s[2] for w in workers for s in w.steps if s[1] > beyond)
    return float(max(0, before + 1 - first))


def pause(workers, since, until):
    worst = 0.0
    for worker in workers:
        times = [s[0] for s in worker.steps]
        gaps = [b - a for a, b in zip(times, times[1:])]
        around = [b - a for a, b in zip(times, times[1:]) if b > since and a < until]
        worst = max(worst, max(around, default=0.0) - statistics.median(gaps))
    return worst


def fault(options, folder, number):
    team = Team(options, folder)
    victim, survivors = team.workers[1], [w for i, w in enumerate(team.workers) if i != 1]
    beyond, began = victim.generation(), time.time()
    victim.process.send_signal(number)
    team.await_steps(survivors, 2, beyond)
    result = {"seconds": next_step(survivors, began, beyond) - began, "steps lost": lost(survivors, beyond)}
    team.end()
    return result


def kill(options, folder):
    return fault(options, folder, signal.SIGKILL)


def stop(options, folder):
    result = fault(options, folder, signal.SIGSTOP)
    return {"seconds beyond the heartbeat time-out": result["seconds"] - HEARTBEAT_S, "steps lost": result["steps lost"]}


def join(options, folder):
    team = Team(options, folder, workers=3)
    others, beyond, began = list(team.workers), team.workers[0].generation(), time.time()
    newcomer = Worker(team, "late")
    team.workers.append(newcomer)
    team.await_steps([newcomer], 2, beyond)
    first = newcomer.steps[0][0]
    result = {"seconds": first - began, "others' pause": pause(others, began, first + 0.01), "steps lost": lost(others, beyond)}
    team.end()
    return result


def coordinator(options, folder):
    team = Team(options, folder)
    generation, began = team.workers[0].generation(), time.time()
    team.coordinator.kill()
    team.coordinator.wait()
    team.serve("--resume")
    events = folder / "run" / "events.jsonl"
    wanted = ("generation_continued", "generation_formed")
    while True:
        told = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")]
        since = [i for i, e in enumerate(told) if e["event"] == "coordinator_restarted"]
        back = [e for e in told[since[0]:] if e["event"] in wanted] if since else []
        if back:
            break
        time.sleep(0.01)
    answered = time.time()
    reached = {id(w): len(w.steps) for w in team.workers}
    while any(len(w.steps) < reached[id(w)] + 3 for w in team.workers):
        time.sleep(0.01)
    same = all(w.generation() == generation for w in team.workers)
    result = {
        "seconds": answered - began,
        "workers' pause": pause(team.workers, began, answered + 0.5),
        "generation went on": float(same),
    }
    team.end()
    return result


def torchrun(options, folder):
    steps_an_epoch, batch = 30, 2
    script = Path(__file__).with_name("elastic_peer.py")
    command = [
        options.python, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--max-restarts", "3", "--standalone",
        script, options.peer, folder / "checkpoint.pt",
        str(steps_an_epoch), "1000", str(batch), "0.25", "64",
    ]
    # With the agent's own store, restarted ranks meet addresses of those before and take several restarts of 5 s.
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, start_new_session=True)
    records = []

    def read():
        for line in process.stdout:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue

    threading.Thread(target=read, daemon=True).start()
    middle = steps_an_epoch + steps_an_epoch // 2  # of the second epoch

    def wait_for(is_there):
        while not any(is_there(record) for record in list(records)):
            if process.poll() is not None:
                raise SystemExit("torchrun has ended: try its command by hand")
            time.sleep(0.01)

    wait_for(lambda record: record["step"] >= middle)
    victim = next(r["pid"] for r in records if r["rank"] == 1)
    old = {r["pid"] for r in records}
    began, reached = time.time(), max(r["step"] for r in records)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda record: record["pid"] not in old)
    again = next(r for r in list(records) if r["pid"] not in old)
    process.terminate()  # it ends its workers
    process.wait()
    lost_steps = float(max(0, reached + 1 - again["step"]))
    return {"seconds": again["time"] - began, "steps lost": lost_steps, "samples lost": lost_steps * batch * 4}


if __name__ == "__main__":
    main()
