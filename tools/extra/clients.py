"""What others say to the coordinator: Prometheus' own parsers read its metrics, and gRPC's Python client asks for
its health and its services' descriptions.

    python tools/extra/clients.py target/release
"""

import sys
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from google.protobuf.descriptor_pool import DescriptorPool
from live import launched, waited
from prometheus_client.openmetrics import parser as openmetrics


def scraped(page):
    """{(name, labels): value}, and the families."""
    answer = urllib.request.urlopen(f"{page}/metrics")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0"), answer.headers
    families = list(openmetrics.text_string_to_metric_families(answer.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}, families


with launched(sys.argv[1]) as run:
    started = run.wait_for("run_started")
    run.wait_for("checkpoint_committed")
    before, families = scraped(started["page"])
    assert all(family.documentation for family in families), "each metric says what it is"
    assert before["musher_team_size", ()] == 2.0, before
    assert before["musher_checkpoints_total", (("result", "committed"),)] >= 1
    ranks = {dict(labels)["rank"] for name, labels in before if name == "musher_step_seconds"}
    assert ranks == {"0", "1"}, ranks
    waited("growing step", lambda: scraped(started["page"])[0]["musher_applied_step", ()] > before["musher_applied_step", ()])

    channel = grpc.insecure_channel(started["address"])
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="musher.v1.Training"))
    assert health.status == health_pb2.HealthCheckResponse.SERVING, health
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"musher.v1.Training", "musher.v1.Checkpoints", "musher.v1.Control"} <= services, services
    control = DescriptorPool(database).FindServiceByName("musher.v1.Control")
    assert {method.name for method in control.methods} == {"Status", "Stop", "Drain"}
print("metrics, health and reflection: ok")
