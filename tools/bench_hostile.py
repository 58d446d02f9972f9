#!/usr/bin/env python3
"""What a hostile client does to a run: training's rate and the coordinator's processor time before, during and after.

bench_hostile.py [--data PETS] [--bin target/release] [--seconds 20] [--rate 20]

The small job with two workers and a join token. The client, at the lowest priority for not to be measured itself, opens
RATE connections a second in turn: bytes at random; frames that claim 16 MiB; ten thousand streams on one connection,
without a token; and connections that say nothing and stay. Prints a Markdown table; an event that tells of trouble in
the run (a worker lost, a generation aborted) is named below it.
"""
import argparse, json, os, pathlib, secrets, socket, statistics, struct, subprocess, sys, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TROUBLE = {"worker_left", "generation_aborted", "steps_lost", "checkpoint_failed", "run_failed"}


def frame(kind, flags, stream, payload, claimed=None):
    length = len(payload) if claimed is None else claimed
    return struct.pack("!I", length)[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def request_headers(address):
    """A POST to the workers' service; HPACK without compression, names from the static table (RFC 7541)."""
    literal = lambda index, text: bytes([0x40 | index, len(text)]) + text
    return b"\x83\x86" + literal(4, b"/musher.v1.Training/Session") + literal(1, address.encode()) + literal(31, b"application/grpc")


def garbage(address):
    yield secrets.token_bytes(1 << 16)


def huge_frames(address):
    yield PREFACE + frame(4, 0, 0, b"")
    for _ in range(16):
        yield frame(0, 0, 1, secrets.token_bytes(1 << 14), claimed=(1 << 24) - 1)


def streams(address):
    yield PREFACE + frame(4, 0, 0, b"")
    headers = request_headers(address)
    for first in range(1, 20_000, 200):
        yield b"".join(frame(1, 4, stream, headers) for stream in range(first, first + 200, 2))


def silence(address):
    yield PREFACE[:10]


class Client(threading.Thread):
    """Goes on until it is told to stop; never waits for an answer."""

    def __init__(self, address, rate):
        super().__init__(daemon=True)
        self.address, self.rate, self.over, self.opened, self.refused = address, rate, threading.Event(), 0, 0

    def run(self):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        host, port = self.address.rsplit(":", 1)
        kinds, held = [garbage, huge_frames, streams, silence], []
        while not self.over.wait(1 / self.rate):
            try:
                connection = socket.create_connection((host, int(port)), timeout=1)
                held.append(connection)
                for words in kinds[self.opened % len(kinds)](self.address):
                    connection.sendall(words)
            except OSError:
                self.refused += 1
            self.opened += 1
            for old in held[:-200]:
                old.close()
            held = held[-200:]


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=ROOT / "data/synth"); p.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release")
    p.add_argument("--seconds", type=float, default=20); p.add_argument("--rate", type=float, default=20, help="connections a second")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = pathlib.Path(scratch) / "run"
        settings = {"data.root": str(pathlib.Path(a.data).resolve()), "train.epochs": 1000, "early_stopping.patience": 1000,
                    "checkpoint.every_epochs": 0, "server.grpc": "127.0.0.1:0", "server.http": "127.0.0.1:0"}
        command = [a.bin / "musher", "launch", ROOT / "jobs/small.toml", "--workers", 2, "--run-dir", run, "--log-format", "json"]
        for key, value in settings.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        tokens = {"MUSHER_JOIN_TOKEN": secrets.token_hex(32), "MUSHER_OPERATOR_TOKEN": secrets.token_hex(32)}
        launched = subprocess.Popen([str(c) for c in command], env={**os.environ, **tokens}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        events = lambda: [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()] if (run / "events.jsonl").exists() else []
        step = lambda: max((e["step"] for e in events() if e["event"] == "progress"), default=0)
        try:
            while step() < 20:
                if launched.poll() is not None:
                    sys.exit(f"the run has ended: {' '.join(map(str, command))}")
                time.sleep(0.1)
            address = next(e["address"] for e in events() if e["event"] == "run_started")

            def watch():
                began, cpu, first = time.monotonic(), cpu_seconds(launched.pid), step()
                time.sleep(a.seconds)
                took = time.monotonic() - began
                return (step() - first) / took, (cpu_seconds(launched.pid) - cpu) / took

            rows = [("before", *watch())]
            client = Client(address, a.rate)
            client.start()
            rows.append((f"during", *watch()))
            client.over.set()
            client.join()
            rows.append(("after", *watch()))
            told = [f"{e['event']}: {e.get('reason', '')}" for e in events() if e["event"] in TROUBLE]
        finally:
            launched.terminate()
            launched.wait()
    print("| | steps a second | the coordinator, of one core |\n| --- | --- | --- |")
    for when, rate, cpu in rows:
        print(f"| {when} | {rate:.2f} | {cpu:.1%} |")
    print(f"\n{client.opened} connections, {client.refused} of them cut off while they spoke; trouble in the run: {', '.join(told) or 'none'}")


if __name__ == "__main__":
    main()
