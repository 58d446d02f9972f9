"""The manifests against schemas: what `musher kube render` writes, and each overlay as kustomize builds it.
Kubernetes' own kinds by its own schemas, of every version that is supported; kinds of other projects by those in
deploy/schemas.

    python tools/manifests.py target/release

It needs PyYAML and jsonschema. Without kubernetes-validate or kubectl it does what it can, and says what not.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import yaml

try:
    import kubernetes_validate
except ImportError:
    kubernetes_validate = None

# What deploy/README.md asks for.
OLDEST = (1, 31)
musher = pathlib.Path(sys.argv[1]) / "musher"
schemas = {}
for file in pathlib.Path("deploy/schemas").glob("*.json"):
    schemas[file.stem.replace("_", "/")] = json.loads(file.read_text())


def versions():
    package = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    found = {tuple(map(int, match.groups())) for path in package.iterdir() if (match := re.match(r"v(\d+)\.(\d+)\.", path.name))}
    return [f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST]


def check(name, text):
    documents = [document for document in yaml.safe_load_all(text) if document]
    assert documents, name
    for document in documents:
        what = f"{name}: {document['kind']} {document['metadata']['name']}"
        if document["apiVersion"] in schemas:
            foreign(what, document)
            # The pods in it are Kubernetes' own.
            for job in document["spec"].get("replicatedJobs", []):
                inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
                kubernetes(f"{what}, {job['name']}", inner)
        else:
            kubernetes(what, document)
    print(f"{name}: {len(documents)} objects")


def foreign(what, document):
    # The one shape that is meant, so that its complaint is told and not that of all of them.
    shapes = [shape for shape in schemas[document["apiVersion"]]["oneOf"] if shape["properties"]["kind"]["const"] == document["kind"]]
    if not shapes:
        raise SystemExit(f"{what}: deploy/schemas has no such kind")
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(shapes[0]).iter_errors(document))
    if error:
        raise SystemExit(f"{what}: {error.message} at {list(error.path)}")


def kubernetes(what, document):
    for version in supported:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise SystemExit(f"{what}, Kubernetes {version}: {error.message} at {list(error.path)}")
        except kubernetes_validate.SchemaNotFoundError:
            raise SystemExit(f"{what}: neither Kubernetes {version} nor deploy/schemas knows {document['apiVersion']}")


supported = versions() if kubernetes_validate else []
for name, flags in {
    "render": ["--nodes=4", "--gpus-per-node=8"],
    "render on CPUs": ["--nodes=2", "--gpus-per-node=0"],
    "render as a JobSet": ["--nodes=4", "--gpus-per-node=8", "--jobset", "--queue=gpus"],
}.items():
    check(name, subprocess.check_output([musher, "kube", "render", "jobs/pets.toml", *flags], text=True))
check("pdb.yaml", pathlib.Path("deploy/k8s/pdb.yaml").read_text())
overlays = [pathlib.Path("deploy/k8s/base"), *sorted(pathlib.Path("deploy/k8s/overlays").iterdir())]
if shutil.which("kubectl"):
    for overlay in overlays:
        check(str(overlay), subprocess.check_output(["kubectl", "kustomize", overlay], text=True))
else:
    print("SKIPPED: the overlays, as there is no kubectl")
if kubernetes_validate:
    print(f"Kubernetes {', '.join(supported)}; {', '.join(sorted(schemas))}")
else:
    print("SKIPPED: Kubernetes' own kinds, as there is no kubernetes-validate (pip install kubernetes-validate)")
