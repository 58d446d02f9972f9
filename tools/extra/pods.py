"""The rendered manifests, run for real in spirit: each pod is a process in a network namespace of its own, with its
own address, name resolution, volumes, user and a read-only root, started from nothing but its pod's spec; this
script is kubelet and Job controller. Pods are killed, evicted, added and drained, the coordinator's container dies,
and the run finishes.

    python tools/extra/pods.py target/release            (as root; needs bubblewrap, iproute2 and util-linux)
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import yaml

from live import events_in

BINARIES = pathlib.Path(sys.argv[1]).resolve()
NET = "10.79.43"
BRIDGE = f"mp{os.getpid() % 100000}"
JOB = """
name = "pods"
seed = 44
data.image_size = 64
model.width = 0.0625
train.global_batch = 8
train.epochs = 150
early_stopping.patience = 1000
cluster.device = "cpu"
cluster.regroup_window_s = 0.2
cluster.heartbeat_timeout_s = 4
cluster.step_timeout_s = 10
"""
PATIENCE_S = int(os.environ.get("PATIENCE_S", 240))
BACK_OFF_S = 1


def sh(*command, **more):
    return subprocess.run([str(part) for part in command], check=True, **more)


class Pod:
    """One pod of a Job's template: an address, a name, volumes, and the process of its one container."""

    count = 0

    def __init__(self, cluster, job):
        Pod.count += 1
        self.cluster, self.job = cluster, job
        self.name = f"{job['metadata']['name']}-{Pod.count}"
        self.address, self.namespace = f"{NET}.{Pod.count + 10}", f"{BRIDGE}-{Pod.count}"
        self.spec = job["spec"]["template"]["spec"]
        self.labels = job["spec"]["template"]["metadata"]["labels"]
        self.evicted, self.asked_to_go, self.process = False, False, None
        self.dir = cluster.place / self.name
        self.dir.mkdir()
        self.hosts = self.dir / "hosts"
        self.hosts.touch()
        inside, outside = f"{BRIDGE}i{Pod.count}", f"{BRIDGE}o{Pod.count}"
        sh("ip", "netns", "add", self.namespace)
        sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        sh("ip", "link", "set", inside, "netns", self.namespace)
        sh("ip", "link", "set", outside, "master", BRIDGE, "up")
        for part in (["link", "set", "lo", "up"], ["addr", "add", f"{self.address}/24", "dev", inside], ["link", "set", inside, "up"]):
            sh("ip", "-n", self.namespace, *part)

    def volume(self, volume):
        """The directory that a volume is."""
        place = self.cluster.place
        match volume:
            case {"configMap": {"name": name}} | {"secret": {"secretName": name, "items": _}} | {"secret": {"secretName": name}}:
                kept = volume.get("secret", {}).get("items")
                held = self.cluster.objects[name]
                files = {item["path"]: held[item["key"]] for item in kept} if kept else held
                made = self.dir / volume["name"]
                made.mkdir(exist_ok=True)
                for file, text in files.items():
                    (made / file).write_text(text)
                    os.chown(made / file, 0, self.spec["securityContext"]["fsGroup"])
                    (made / file).chmod(volume.get("secret", {}).get("defaultMode", 0o644))
                return made
            case {"persistentVolumeClaim": {"claimName": name}}:
                return self.cluster.claim(name, self.spec["securityContext"]["fsGroup"])
            case {"emptyDir": _}:
                made = self.dir / volume["name"]
                made.mkdir(exist_ok=True)
                made.chmod(0o777)
                return made
        raise SystemExit(f"no such volume here: {volume}")

    def start(self):
        container = self.spec["containers"][0]
        env = {"PATH": "/usr/bin:/bin"}
        for variable in container.get("env", []):
            field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            env[variable["name"]] = variable.get("value") or {"metadata.name": self.name, "status.podIP": self.address}[field]
        args = list(container["args"])
        for name, value in env.items():
            args = [arg.replace(f"$({name})", value) for arg in args]
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        user = self.spec["securityContext"]["runAsUser"]
        jail = ["bwrap", "--die-with-parent", "--proc", "/proc", "--dev", "/dev"]
        self.known = set()
        for shared in ("/usr", "/lib", "/lib64", "/bin", "/sbin", str(BINARIES), *self.cluster.libraries):
            jail += [*self.parents(shared), "--ro-bind", shared, shared]
        jail += [*self.parents("/etc/hosts"), "--ro-bind", self.hosts, "/etc/hosts", "--ro-bind", "/etc/nsswitch.conf", "/etc/nsswitch.conf"]
        for mount in container["volumeMounts"]:
            kind = "--ro-bind" if mount.get("readOnly") else "--bind"
            jail += [*self.parents(mount["mountPath"]), kind, self.volume(volumes[mount["name"]]), mount["mountPath"]]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        jail += ["--remount-ro", "/", "--clearenv"]
        for name, value in env.items():
            jail += ["--setenv", name, value]
        lesser = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"]
        program = BINARIES / {"musher-coordinator": "musher", "musher-worker": "musher-worker"}[container["image"]]
        # In the place of a CPU limit: threads follow from it.
        limit = ["taskset", "--cpu-list", Pod.count % os.cpu_count()]
        command = [*limit, "ip", "netns", "exec", self.namespace, *jail, *lesser, program, *args]
        self.log = self.dir / "log"
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=self.log.open("a"))

    def parents(self, path):
        """Directories above a mount, which all may pass through."""
        above = [str(parent) for parent in reversed(pathlib.PurePath(path).parents) if str(parent) not in ("/", "/dev", *self.known)]
        self.known.update(above)
        return [part for parent in above for part in ("--perms", "0755", "--dir", parent)]

    def container(self):
        """The id of the container's own process, below those that set it up."""
        pid = self.process.pid
        while True:
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            comm = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
            if comm.startswith("musher") or not children:
                return pid
            pid = int(children[0])

    def signal(self, what):
        os.kill(self.container(), what)

    def delete(self):
        """As kubelet ends a pod: SIGTERM, and SIGKILL when its time is over."""
        self.asked_to_go = True
        self.signal(signal.SIGTERM)

    def exit_code(self):
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


class Cluster:
    """The Job controller, and what kubelet and DNS do for it."""

    def __init__(self, place, documents):
        self.place, self.claims, self.objects = place, {}, {}
        self.jobs, self.services = {}, {}
        for document in documents:
            name = document["metadata"]["name"]
            match document["kind"]:
                case "ConfigMap":
                    self.objects[name] = document["data"]
                case "Job":
                    self.jobs[name] = document
                case "Service":
                    self.services[name] = document["spec"]["selector"]
        listed = subprocess.check_output(["ldd", BINARIES / "musher-worker"], text=True)
        found = {os.path.realpath(line.split()[2]) for line in listed.splitlines() if "=> /" in line and "torch" in line}
        # Under the path that the program looks at, which may be a link.
        self.libraries = {line.split()[2].rsplit("/", 1)[0] for line in listed.splitlines() if "=> /" in line and "torch" in line}
        self.libraries |= {os.path.dirname(path) for path in found}
        self.pods, self.failures, self.completed, self.history = [], 0, set(), []
        self.due = {}

    def claim(self, name, group):
        made = self.place / f"claim-{name}"
        if not made.exists():
            made.mkdir()
        os.chown(made, 0, group)
        made.chmod(0o2775)
        return made

    def resolve(self):
        """Names of services, for all pods. In place: the files are mounted."""
        lines = ["127.0.0.1 localhost"]
        for name, selector in self.services.items():
            for pod in self.pods:
                if selector.items() <= pod.labels.items():
                    lines.append(f"{pod.address} {name}")
        for pod in self.pods:
            pod.hosts.write_text("\n".join(lines) + "\n")

    def of(self, job):
        return [pod for pod in self.pods if pod.job["metadata"]["name"] == job]

    def start(self, job):
        pod = Pod(self, self.jobs[job])
        self.pods.append(pod)
        self.resolve()
        pod.start()
        return pod

    def look(self):
        """One round of the controller."""
        for pod in list(self.pods):
            code = pod.exit_code()
            if code is None:
                continue
            name, spec = pod.job["metadata"]["name"], pod.job["spec"]
            if code != 0 and pod.spec["restartPolicy"] == "OnFailure":
                self.history.append((pod.name, code, "restarted in place"))
                self.failures += 1
                assert self.failures <= spec["backoffLimit"]
                time.sleep(BACK_OFF_S)
                pod.start()
                continue
            self.pods.remove(pod)
            self.resolve()
            if code == 0:
                self.completed.add(name)
                self.history.append((pod.name, code, "Succeeded"))
                continue
            action = self.policy(spec, pod, code)
            self.history.append((pod.name, code, action))
            if action == "FailJob":
                raise SystemExit(f"the Job {name} failed: {pod.name} ended with {code}\n{pod.log.read_text()[-3000:]}")
            if action == "Count":
                self.due[name] = time.monotonic() + BACK_OFF_S
        for name, job in self.jobs.items():
            spec = job["spec"]
            # Once one has succeeded, nobody is replaced; with podReplacementPolicy Failed, not before it is gone.
            alive = self.of(name)
            if name in self.completed or self.due.get(name, 0) > time.monotonic():
                continue
            leaving = [pod for pod in alive if pod.asked_to_go]
            for _ in range(spec["parallelism"] - len(alive)):
                self.start(name)
            for pod in reversed(alive[spec["parallelism"] :]):
                if not leaving:
                    pod.delete()

    @staticmethod
    def policy(spec, pod, code):
        for rule in spec["podFailurePolicy"]["rules"]:
            match rule:
                case {"onExitCodes": {"values": values, "operator": "In"}} if code in values:
                    return rule["action"]
                case {"onPodConditions": [{"type": "DisruptionTarget"}]} if pod.evicted:
                    return rule["action"]
        return "Count"

    def events(self):
        return events_in(self.place / "claim-pods-run/run/events.jsonl")

    def until(self, what, holds):
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            self.look()
            if time.monotonic() > deadline:
                logs = "\n".join(f"-- {pod.name}\n{pod.log.read_text()[-1500:]}" for pod in self.pods)
                logs += "\n-- events\n" + "\n".join(json.dumps(e) for e in self.events() if e["event"] != "progress")[-6000:]
                raise SystemExit(f"no {what} within {PATIENCE_S} s; {self.history[-20:]}\n{logs}")
            time.sleep(0.1)
        print(f"  {what}")

    def team_of(self, size, after):
        return lambda: any(e["event"] == "generation_formed" and e["world_size"] == size for e in self.events()[after:])

    def probe(self, pod, which):
        get = pod.spec["containers"][0][which]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
        try:
            return urllib.request.urlopen(f"http://{pod.address}:{ports[get['port']]}{get['path']}", timeout=6).status == 200
        except (urllib.error.URLError, OSError):
            return False


def main(place):
    (place / "job.toml").write_text(JOB)
    render = [BINARIES / "musher", "kube", "render", place / "job.toml", "--nodes=2", "--gpus-per-node=0"]
    cluster = Cluster(place, [d for d in yaml.safe_load_all(subprocess.check_output(render, text=True)) if d])
    cluster.objects["musher-tokens"] = {"join": "0123456789abcdef-join", "operator": "0123456789abcdef-operator"}
    data = cluster.claim("musher-data", 65532)
    sh(BINARIES / "musher", "data", "synth", data / "drawn", "--train", "80", "--val", "16", stdout=subprocess.DEVNULL)
    for made in (data / "drawn").iterdir():
        made.rename(data / made.name)
    (data / "drawn").rmdir()
    workers = cluster.jobs["pods-workers"]

    cluster.until("a coordinator that is alive and ready, without workers", lambda: (c := cluster.of("pods-coordinator")) and cluster.probe(c[0], "startupProbe") and cluster.probe(c[0], "readinessProbe"))
    cluster.until("workers that are alive, though they may wait yet", lambda: len(pods := cluster.of("pods-workers")) == 2 and all(cluster.probe(pod, "startupProbe") and cluster.probe(pod, "livenessProbe") for pod in pods))
    cluster.until("a team of two", cluster.team_of(2, 0))

    told = len(cluster.events())
    cluster.of("pods-workers")[0].signal(signal.SIGKILL)
    cluster.until("a pod that was killed is replaced", cluster.team_of(2, told))
    assert cluster.history[-1][1:] == (137, "Count"), cluster.history

    told = len(cluster.events())
    evicted = cluster.of("pods-workers")[0]
    evicted.evicted = True
    evicted.delete()
    cluster.until("an evicted pod leaves, and is replaced", cluster.team_of(2, told))
    assert (evicted.name, 75, "Ignore") in cluster.history, cluster.history

    told = len(cluster.events())
    workers["spec"]["parallelism"] = 3
    cluster.until("a third pod is taken in", cluster.team_of(3, told))
    assert not any(e["event"] == "generation_aborted" for e in cluster.events()[told:])

    told = len(cluster.events())
    workers["spec"]["parallelism"] = 2
    cluster.until("the third pod leaves, and nobody aborts", cluster.team_of(2, told))
    assert not any(e["event"] == "generation_aborted" for e in cluster.events()[told:])

    told = len(cluster.events())
    cluster.of("pods-coordinator")[0].signal(signal.SIGKILL)
    goes_on = lambda: any(e["event"] in ("generation_continued", "generation_formed") for e in cluster.events()[told:])
    cluster.until("a coordinator that was killed goes on with the run", goes_on)
    assert cluster.probe(cluster.of("pods-coordinator")[0], "livenessProbe")

    told = len(cluster.events())
    moved = cluster.of("pods-coordinator")[0]
    moved.evicted = True
    moved.delete()
    cluster.until("a coordinator that is evicted leaves the run to the next", lambda: any(e["event"] == "generation_continued" for e in cluster.events()[told:]))
    assert (moved.name, 75, "Ignore") in cluster.history, cluster.history
    assert not any(e["event"] in ("run_finished", "worker_left", "generation_aborted") for e in cluster.events()[told:])

    cluster.until("the run finishes, and both Jobs are complete", lambda: not cluster.pods)
    assert cluster.completed == {"pods-coordinator", "pods-workers"}, cluster.history
    finished = [e for e in cluster.events() if e["event"] == "run_finished"]
    assert [e["status"] for e in finished] == ["finished"], finished
    samples = [e["samples"] for e in cluster.events() if e["event"] == "epoch_finished"]
    assert samples == [80] * len(samples), samples
    print("pods: ok;", ", ".join(f"{name} {code} {action}" for name, code, action in cluster.history))


if __name__ == "__main__":
    if os.geteuid() != 0 or not all(map(shutil.which, ("bwrap", "ip", "setpriv"))):
        print("SKIPPED: pods as local processes need root, bubblewrap, iproute2 and util-linux")
        sys.exit()
    place = pathlib.Path(tempfile.mkdtemp())
    place.chmod(0o755)
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    sh("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
    sh("ip", "link", "set", BRIDGE, "up")
    started = []
    begin, Pod.start = Pod.start, lambda pod: (begin(pod), started.append(pod.process))[0]
    try:
        main(place)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for nth in range(1, Pod.count + 1):
            subprocess.run(["ip", "netns", "del", f"{BRIDGE}-{nth}"])
        subprocess.run(["ip", "link", "del", BRIDGE])
        shutil.rmtree(place)
