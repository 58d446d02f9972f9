"""The manifests against Kubernetes' own schemas, of several versions: what `musher kube render` writes, and each
overlay as kustomize builds it.

    python tools/extra/kubernetes.py target/release
"""

import pathlib
import shutil
import subprocess
import sys

import kubernetes_validate
import yaml

VERSIONS = ["1.31", "1.32", "1.33"]
# Kinds of other projects, whose schemas are not Kubernetes'.
FOREIGN = {"jobset.x-k8s.io/v1alpha2", "cert-manager.io/v1", "monitoring.coreos.com/v1"}
musher = pathlib.Path(sys.argv[1]) / "musher"


def check(name, text):
    documents = [document for document in yaml.safe_load_all(text) if document]
    assert documents, name
    for document in documents:
        what = f"{name}: {document['kind']} {document['metadata']['name']}"
        if document["apiVersion"] in FOREIGN:
            # The pods in it are Kubernetes' own.
            for job in document["spec"].get("replicatedJobs", []):
                inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
                validate(f"{what}, {job['name']}", inner)
            continue
        validate(what, document)
    print(f"{name}: {len(documents)} objects")


def validate(what, document):
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise SystemExit(f"{what}, Kubernetes {version}: {error.message} at {list(error.path)}")


for name, flags in {
    "render": ["--nodes=4", "--gpus-per-node=8"],
    "render on CPUs": ["--nodes=2", "--gpus-per-node=0"],
    "render as a JobSet": ["--nodes=4", "--gpus-per-node=8", "--jobset", "--queue=gpus"],
}.items():
    check(name, subprocess.check_output([musher, "kube", "render", "jobs/pets.toml", *flags], text=True))
check("pdb.yaml", pathlib.Path("deploy/k8s/pdb.yaml").read_text())
if shutil.which("kubectl"):
    for overlay in [pathlib.Path("deploy/k8s/base"), *sorted(pathlib.Path("deploy/k8s/overlays").iterdir())]:
        check(str(overlay), subprocess.check_output(["kubectl", "kustomize", overlay], text=True))
else:
    print("SKIPPED: the overlays, as there is no kubectl")
