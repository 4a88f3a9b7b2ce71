"""The Kubernetes manifests: valid against Kubernetes' schemas, and true to the server: probes, ports, drain, settings.

How kustomize puts them together is done here in small (merging by name, as far as the overlays use it), so that what
the overlays make is validated too.
"""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.app import create_app
from server.cli import draining
from server.metrics import Metrics
from server.runtime import service
from server.settings import Settings, env_name
from server.settings_sources import resolve_settings
from tests.prometheus import promtool
from tests.unit.deploy.test_prometheus_rules import sample_names

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy/kubernetes"
# The oldest release whose schemas the validator has, and the newest: a cluster is somewhere between.
VERSIONS = ("1.25", "1.37")
# Of the Prometheus operator, which Kubernetes' own schemas do not have.
FOREIGN_KINDS = {"ServiceMonitor"}
KUSTOMIZATIONS = sorted(FOLDER.rglob("kustomization.yaml"))
NOT_MANIFESTS = {"kustomization.yaml", "adapter-rules.yaml", "gpu.yaml"}
MANIFESTS = sorted(path for path in FOLDER.rglob("*.yaml") if path.name not in NOT_MANIFESTS)


def load(path: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / path).read_text())
    return document


def merged(base: Any, patch: Any) -> Any:
    """As kustomize merges: maps by key, lists of named things by name, other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base[key], value) if key in base else value for key, value in patch.items()}
    if isinstance(base, list) and all(isinstance(item, dict) and "name" in item for item in [*base, *patch]):
        by_name = {item["name"]: item for item in base}
        for item in patch:
            by_name[item["name"]] = merged(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return patch


DEPLOYMENT = load("base/deployment.yaml")
CUDA_DEPLOYMENT = merged(DEPLOYMENT, load("overlays/cuda/gpu.yaml"))
JOB = load("first-key/job.yaml")


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(workload)["containers"]
    assert isinstance(container, dict)
    return container


def settings_in_pods() -> Settings:
    """What a server in a pod is set to: the image's variables and the Deployment's, over the file."""
    given = re.findall(r"\b(PROMPTMUX_[A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text())
    image = {name: value for name, value in given if name in {env_name(field) for field in Settings.model_fields}}
    own = {
        variable["name"]: variable.get("value", "postgresql://u:p@db/promptmux")
        for variable in container_of(DEPLOYMENT)["env"]
    }
    return resolve_settings({}, FOLDER / "base/settings.toml", image | own).settings


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_is_valid(path: Path, version: str) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] not in FOREIGN_KINDS:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_deployment_with_gpus_is_valid(version: str) -> None:
    kubernetes_validate.validate(CUDA_DEPLOYMENT, version, strict=True)


def test_a_misspelt_field_is_not_valid() -> None:
    wrong = merged(DEPLOYMENT, {"spec": {"template": {"spec": {"terminationGraceSeconds": 60}}}})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(FOLDER)))
def test_kustomization_names_files_that_are_there_and_leaves_none_out(path: Path) -> None:
    kustomization = yaml.safe_load(path.read_text())
    named = [
        *kustomization.get("resources", ()),
        *(patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch),
    ]
    named += [file for made in kustomization.get("configMapGenerator", ()) for file in made["files"]]

    assert kustomization["kind"] in {"Kustomization", "Component"}
    assert named
    assert all((path.parent / name).exists() for name in named)
    # The adapter's values are for its own chart.
    there = {file.name for file in path.parent.iterdir()} - {"kustomization.yaml", "adapter-rules.yaml"}
    assert {name for name in named if "/" not in name} == there


def test_settings_file_and_variables_are_settings_in_force() -> None:
    settings = settings_in_pods()
    variables = {variable["name"] for variable in container_of(DEPLOYMENT)["env"]}

    for name, value in tomllib.loads((FOLDER / "base/settings.toml").read_text()).items():
        assert getattr(settings, name) == value, name
    assert variables <= {env_name(name) for name in Settings.model_fields}
    assert settings.store is not None
    assert settings.demo_dir is None
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_a_route_of_the_server_at_its_port(probe: str) -> None:
    container = container_of(DEPLOYMENT)
    asked = container[probe]["httpGet"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    app = create_app(Settings())
    expected = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}

    assert asked["path"] == expected[probe]
    assert asked["path"] in app.openapi()["paths"]
    assert ports[asked["port"]] == settings_in_pods().port


def test_a_failed_engine_is_seen_by_the_liveness_probe_or_ends_by_itself() -> None:
    probe = container_of(DEPLOYMENT)["livenessProbe"]
    # The server's own end comes first: a restart by the kubelet is for one that cannot even end.
    assert probe["periodSeconds"] * probe["failureThreshold"] > settings_in_pods().failure_grace_s


def test_services_and_policies_lead_to_the_ports_of_the_server() -> None:
    settings = settings_in_pods()
    ports = {port["name"]: port["containerPort"] for port in container_of(DEPLOYMENT)["ports"]}
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    kubernetes_service = load("base/service.yaml")
    policy = load("base/networkpolicy.yaml")["spec"]
    monitor = load("components/monitoring/servicemonitor.yaml")

    assert ports == {"http": settings.port, "metrics": settings.metrics_port}
    assert {port["targetPort"] for port in kubernetes_service["spec"]["ports"]} == set(ports)
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports)
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    selectors = [kubernetes_service["spec"]["selector"], DEPLOYMENT["spec"]["selector"]["matchLabels"]]
    selectors += [
        policy["podSelector"]["matchLabels"],
        load("base/poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= kubernetes_service["metadata"]["labels"].items()
    # Rules and alerts go by this name.
    assert kubernetes_service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "promptmux"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in kubernetes_service["spec"]["ports"]}


@pytest.mark.parametrize("workload", [DEPLOYMENT, CUDA_DEPLOYMENT], ids=["cpu", "cuda"])
def test_pod_is_given_longer_than_the_longest_drain(workload: dict[str, Any]) -> None:
    container = container_of(workload)
    name, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep"

    for settings in (Settings(), settings_in_pods()):
        longest_s = int(seconds) + settings.drain_timeout_s + service.ENGINE_STOP_TIMEOUT_S + draining._CLOSE_TIMEOUT_S
        assert pod_of(workload)["terminationGracePeriodSeconds"] >= longest_s + 5


@pytest.mark.parametrize("workload", [DEPLOYMENT, CUDA_DEPLOYMENT, JOB], ids=["cpu", "cuda", "first-key"])
def test_container_can_do_nothing_but_its_work(workload: dict[str, Any]) -> None:
    pod, container = pod_of(workload), container_of(workload)

    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {pod['securityContext']['runAsUser']}:" in (ROOT / "Dockerfile").read_text()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_all_that_the_server_writes_to_is_a_volume() -> None:
    settings = settings_in_pods()
    writable = {mount["mountPath"] for mount in container_of(DEPLOYMENT)["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {str(settings.data_dir), str(settings.cache_dir), "/tmp"}


def test_every_gpu_replica_asks_for_one_gpu_and_no_other_does() -> None:
    assert container_of(CUDA_DEPLOYMENT)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container_of(CUDA_DEPLOYMENT)["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in container_of(DEPLOYMENT)["resources"]["limits"]


def test_no_secret_is_in_the_repository_and_all_refer_to_the_same_one() -> None:
    for path in MANIFESTS:
        assert all(document["kind"] != "Secret" for document in yaml.safe_load_all(path.read_text())), path
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for workload in (DEPLOYMENT, JOB)
        for variable in container_of(workload)["env"]
        if "valueFrom" in variable
    ]
    assert references == [{"name": "promptmux-store", "key": "url"}] * 2


def test_replicas_are_scaled_by_a_metric_that_the_adapter_makes_of_the_server_s(tmp_path: Path) -> None:
    (metric,) = load("components/autoscaling/horizontalpodautoscaler.yaml")["spec"]["metrics"]
    (rule,) = load("components/autoscaling/adapter-rules.yaml")["rules"]["custom"]
    name = metric["pods"]["metric"]["name"]

    assert name in sample_names()
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(name + "{")
    # A target beyond the queue's length would never be met.
    assert float(metric["pods"]["target"]["averageValue"]) < Settings().max_waiting_rows
    query = rule["metricsQuery"]
    for placeholder, value in {"Series": name, "LabelMatchers": 'namespace="n",pod="p"', "GroupBy": "pod"}.items():
        assert f"<<.{placeholder}>>" in query
        query = query.replace(f"<<.{placeholder}>>", value)
    rules = {
        "groups": [
            {"name": "adapter", "rules": [{"record": "x", "expr": query}, {"record": "y", "expr": rule["seriesQuery"]}]}
        ]
    }
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    promtool("check", "rules", tmp_path / "rules.yml")


def test_the_operator_s_own_label_does_not_hide_one_of_ours() -> None:
    (endpoint,) = load("components/monitoring/servicemonitor.yaml")["spec"]["endpoints"]
    dropped = {rule["regex"] for rule in endpoint["relabelings"] if rule["action"] == "labeldrop"}
    # What the operator puts on every target.
    of_operator = {"namespace", "service", "pod", "container", "endpoint", "job", "instance"}
    ours = {label for metric in vars(Metrics()).values() for label in getattr(metric, "_labelnames", ())}
    assert of_operator & ours == dropped


def test_guide_s_commands_wrap_the_rules_for_the_operator() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    (block,) = [found for found in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) if "PrometheusRule" in found]
    command = block.replace("kubectl -n llm apply -f -", "cat")
    printed = subprocess.run(["bash", "-euc", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    documents = [document for document in yaml.safe_load_all(printed) if document]

    files = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))]
    assert {document["kind"] for document in documents} == {"PrometheusRule"}
    assert len({document["metadata"]["name"] for document in documents}) == len(files)
    assert sorted((document["spec"] for document in documents), key=str) == sorted(files, key=str)


def test_guide_s_kustomization_names_folders_that_are_there() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    (block,) = [found for found in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "kind: Kustomization" in found]
    kustomization = yaml.safe_load(block)

    for path in [*kustomization["resources"], *kustomization["components"]]:
        assert (ROOT / path.removeprefix("../promptmux/") / "kustomization.yaml").exists()
    assert [image["name"] for image in kustomization["images"]] == [container_of(DEPLOYMENT)["image"]]
