#!/usr/bin/env python3
"""The checks of GPU_CHECKS.md that need whole runs, and the small ones before them: one line each, 0 if all are as expected.

gpu_checks.py [--device cuda:0] [--bin target/release] [--data DIR] [--tests TEAM_TESTS] [--jobs N] [--only NAME ...]

BIN holds musher, musher-worker and examples/; TEAM_TESTS is the test program `team` of musher-worker (cargo test --release
--locked -p musher-worker --test team --no-run prints its path). Without --data a set is drawn. Several ranks share one GPU,
each with a host id of its own, so that NCCL takes them for machines. --jobs runs several checks at a time. With --device cpu the runs go over the TCP ring: that
shows the script, not the GPU.
"""
import argparse, concurrent.futures, json, os, pathlib, signal, subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 90.0


class Run:
    """A coordinator and its workers, each a process of its own."""

    def __init__(self, a, scratch, name, workers, settings, env=None):
        self.a, self.dir, self.env = a, pathlib.Path(tempfile.mkdtemp(dir=scratch)) / name, {**os.environ, **(env or {})}
        job = scratch / f"{name}.toml"
        job.write_text('name = "check"\n')
        settings = {"data.root": json.dumps(str(a.data)), "data.image_size": 64, "model.width": 0.25, "train.global_batch": 12,
                    "cluster.workers": workers, "cluster.device": f'"{a.device.split(":")[0]}"', "cluster.heartbeat_timeout_s": 2,
                    "cluster.step_timeout_s": 30 if a.device != "cpu" else 5, "server.grpc": '"127.0.0.1:0"', "server.http": '"127.0.0.1:0"', **settings}
        command = [a.bin / "musher", "serve", job, "--run-dir", self.dir, "--log-format", "json"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        self.log = open(scratch / f"{name}.log", "w")
        self.coordinator = subprocess.Popen([str(c) for c in command], stdout=self.log, stderr=self.log)
        self.url = "http://" + self.wait("run_started")["address"]
        self.workers = [self.join(k) for k in range(workers)]

    def join(self, k):
        command = [self.a.bin / "musher-worker", "join", self.url, "--name", f"w{k}", "--device", self.a.device]
        command += ["--threads", 1] if self.a.device == "cpu" else []
        return subprocess.Popen([str(c) for c in command], env={**self.env, "NCCL_HOSTID": f"check-{k}"}, stdout=self.log, stderr=self.log)

    def events(self):
        file = self.dir / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, name, is_it=lambda event: True):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = [e for e in self.events() if e["event"] == name and is_it(e)]
            if found:
                return found[0]
            if self.coordinator.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {name}; see {self.log.name}")

    def end(self, stop=False):
        if stop:
            subprocess.run([self.a.bin / "musher", "stop", self.url], check=True, capture_output=True)
        code = self.coordinator.wait(PATIENCE)
        for worker in self.workers:
            worker.wait(PATIENCE)
        return code

    def kill(self):
        for process in [*self.workers, self.coordinator]:
            if process.poll() is None:
                process.kill()


def program(a, *command):
    """Its last line; it ends with all its processes, in time or not."""
    env = {**os.environ, "MUSHER_TEST_DEVICE": a.device}
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
                               start_new_session=True)
    try:
        said, ended = process.communicate(timeout=PATIENCE)[0], True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, ended = process.communicate()[0], False
    words = said.strip().splitlines() or ["it said nothing"]
    if process.returncode == 77:
        return words[-1]
    assert ended, "\n".join((f"no end within {PATIENCE:.0f} s; its last words:", *words[-30:]))
    assert process.returncode == 0, "\n".join(words[-30:])
    return words[-1]


def team_tests(a, *names):
    assert a.tests, "give --tests"
    return program(a, a.tests, *names, "--test-threads", "1")


def losses(a, scratch, name, workers, settings):
    run = Run(a, scratch, name, workers, {"train.epochs": 2, "early_stopping.start_from_epoch": 9, "model.freeze_batch_norm": "true", **settings})
    try:
        assert run.end() == 0, f"see {run.log.name}"
    finally:
        run.kill()
    return [e["train_loss"] for e in run.events() if e["event"] == "epoch_finished"]


def two_equal_one(a, scratch, limit=1e-3, settings=()):
    one = losses(a, scratch, "one", 1, dict(settings))
    worst = 0.0
    for world in (2, 3):
        several = losses(a, scratch, f"several{world}", world, dict(settings))
        worst = max(worst, *(abs(s / o - 1) for s, o in zip(several, one)))
    assert worst < limit, f"losses {one} and {several} differ"
    return f"losses of 2 and 3 ranks are those of 1 to {worst:.1e}"


def killed(a, scratch, protocol):
    """After 50 steps at least, in the midst of whatever it is at: the survivors keep all steps but the one in flight."""
    settings = {"train.epochs": 100000, "early_stopping.patience": 100000, "checkpoint.every_epochs": 0}
    run = Run(a, scratch, f"killed-{protocol}", 3, settings, {"NCCL_PROTO": protocol})
    try:
        run.wait("progress", lambda e: e["step"] > 50)
        run.workers[1].kill()
        at = time.time()
        formed = run.wait("generation_formed", lambda e: e["generation"] == 2)
        run.wait("progress", lambda e: e["generation"] == 2 and e["step"] > formed["applied_step"])
        took = time.time() - at
        events = run.events()
        told = max(e["step"] for e in events if e["event"] == "progress" and e["generation"] == 1)
        assert formed["applied_step"] >= told and formed["world_size"] == 2, formed
        assert not [e for e in events if e["event"] == "steps_lost"], "a step was lost"
        assert run.end(stop=True) == 75, f"see {run.log.name}"
        return f"generation 2 at step {formed['applied_step']} of {told} told, its progress {took:.2f} s after the kill"
    finally:
        run.kill()


def whole_job(a, scratch):
    settings = {"train.epochs": 3, "early_stopping.patience": 99, "train.precision": '"bf16"', "model.width": 0.5}
    run = Run(a, scratch, "whole", 1, settings)
    try:
        assert run.end() == 0, f"see {run.log.name}"
        validated = [e for e in run.events() if e["event"] == "validated"]
        assert len(validated) == 3, f"{len(validated)} validations"
        assert (run.dir / "best.safetensors").exists(), "no best.safetensors"
        return f"val_loss {validated[-1]['val_loss']:.4f}, accuracy {validated[-1]['val_accuracy']:.3f}"
    finally:
        run.kill()


CHECKS = {
    "device": lambda a, s: program(a, a.bin / "musher-worker", "--version"),
    "parity": lambda a, s: program(a, a.bin / "examples/device_parity", a.device),
    "nccl_sum_2": lambda a, s: program(a, a.bin / "examples/nccl_check", "sum", "--ranks", 2),
    "nccl_sum_3": lambda a, s: program(a, a.bin / "examples/nccl_check", "sum", "--ranks", 3),
    "nccl_abort": lambda a, s: program(a, a.bin / "examples/nccl_check", "abort", "--ranks", 2),
    **{f"nccl_kill_{p}": lambda a, s, p=p: program(a, a.bin / "examples/nccl_check", "kill", "--ranks", 3, "--proto", p)
       for p in ("Simple", "LL", "LL128")},
    "pytorch_losses": lambda a, s: team_tests(a, "reference"),
    "skipped_and_lost": lambda a, s: team_tests(a, "skipped", "loss_of_a_peer", "late"),
    "data": lambda a, s: team_tests(a, "device_data"),
    "two_equal_one": two_equal_one,
    "sync_batch_norm": lambda a, s: team_tests(a, "sync_batch_norm") and two_equal_one(a, s, 3e-2, {"model.freeze_batch_norm": "false", "model.sync_batch_norm": "true"}),
    **{f"kill_{p}": lambda a, s, p=p: killed(a, s, p) for p in ("Simple", "LL", "LL128")},
    "whole_job": whole_job,
}


def check(a, scratch, name):
    """Its line, and whether it is as expected."""
    folder, started = scratch / name, time.monotonic()
    folder.mkdir()
    try:
        said = CHECKS[name](a, folder)
        verdict, more = ("skipped" if said.startswith("skipped") else "ok"), []
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        said, verdict = str(error), "FAILED"
        more = [line for log in sorted(folder.glob("*.log")) for line in (f"--- {log.name}", *log.read_text().splitlines()[-8:])]
    print(f"{verdict:<7} {name:<18} {time.monotonic() - started:6.1f} s  {said}", *more, sep="\n", flush=True)
    return verdict != "FAILED"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda:0"); p.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release")
    p.add_argument("--data", type=pathlib.Path); p.add_argument("--tests", type=pathlib.Path); p.add_argument("--only", nargs="*")
    p.add_argument("--jobs", type=int, default=1)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        scratch = pathlib.Path(scratch)
        if a.data is None:
            a.data = scratch / "synth"
            subprocess.run([a.bin / "musher", "data", "synth", a.data, "--train", "96", "--val", "24"], check=True, capture_output=True)
        a.data = a.data.resolve()
        fine = list(pool.map(lambda name: check(a, scratch, name), a.only or CHECKS))
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
