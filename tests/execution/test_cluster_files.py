"""The files of cluster/: accepted by what reads them, authenticated, and the dashboard never exposed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from minitron_ray.cli.launch import cluster_settings
from minitron_ray.core.errors import ConfigError

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
MANIFESTS = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
SCRIPTS = ("slurm.sh", "static.sh")
SETTINGS = ("local.yaml", "two_nodes.yaml", "static.yaml", "remote.yaml", "gpu.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    # Through JSON: plain dicts, and nothing in them that JSON does not know.
    parsed = YAML(typ="safe", pure=True).load_all((CLUSTER / name).read_text())
    return [json.loads(json.dumps(document)) for document in parsed]


def test_every_file_is_of_a_known_kind() -> None:
    known = {*LAUNCHER, *MANIFESTS, *SCRIPTS, *SETTINGS, "README.md"}
    assert {path.name for path in CLUSTER.iterdir()} == known


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_settings(name: str) -> None:
    assert cluster_settings(CLUSTER / name, None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, f"cluster launcher, .* ray up .*{name}; --cluster takes settings") for name in LAUNCHER),
        *((name, f"Kubernetes manifest, .* kubectl apply -f .*{name}") for name in MANIFESTS),
        ("slurm.sh", "Slurm script, .* sbatch"),
        ("static.sh", "a script, .* bash"),
    ],
)
def test_what_starts_a_cluster_is_refused_as_settings(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster_settings(CLUSTER / name, None)


# --- Ray's cluster launcher -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_accepts_its_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = documents(name)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] == 8
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepared | {"dashboards": 1})


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_nodes_ask_for_a_token_and_hide_the_dashboard(name: str) -> None:
    [config] = documents(name)
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    for role in ("head", "worker"):
        [start] = [one for one in config[f"{role}_start_ray_commands"] if "ray start" in one]
        assert "RAY_AUTH_MODE=token ray start" in start
        assert ("--dashboard-host=127.0.0.1" in start) == (role == "head")


# --- KubeRay --------------------------------------------------------------------------------------------

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = closed(
    {
        "name": {"type": "string", "pattern": "^[a-z0-9-]+$"},
        "image": {"type": "string"},
        "resources": closed({"requests": QUANTITIES, "limits": QUANTITIES}),
        "securityContext": closed({"allowPrivilegeEscalation": {"const": False}}),
        "volumeMounts": {
            "type": "array",
            "items": closed({"name": {}, "mountPath": {}}, "name", "mountPath"),
        },
    },
    "name",
    "image",
    "securityContext",
)
VOLUME = closed(
    {
        "name": {"type": "string"},
        "persistentVolumeClaim": closed({"claimName": {"type": "string"}}, "claimName"),
        "emptyDir": closed({"medium": {"enum": ["", "Memory"]}, "sizeLimit": QUANTITY}),
    },
    "name",
)
TEMPLATE = closed(
    {
        "metadata": closed({"labels": LABELS}),
        "spec": closed(
            {
                # Only an autoscaler asks Kubernetes for anything.
                "automountServiceAccountToken": {"const": False},
                "restartPolicy": {"enum": ["Never", "OnFailure", "Always"]},
                "terminationGracePeriodSeconds": {"type": "integer"},
                "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
                "volumes": {"type": "array", "items": VOLUME},
            },
            "containers",
        ),
    },
    "spec",
)
WORKERS = closed(
    {
        "groupName": {"type": "string"},
        "replicas": {"type": "integer"},
        "minReplicas": {"type": "integer"},
        "maxReplicas": {"type": "integer"},
        "rayStartParams": TEXTS,
        "template": TEMPLATE,
    },
    *("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
)
RAY_CLUSTER = closed(
    {
        "rayVersion": {"type": "string"},
        "authOptions": closed({"mode": {"const": "token"}}, "mode"),
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": closed({"idleTimeoutSeconds": {"type": "integer"}}),
        "headGroupSpec": closed(
            {"serviceType": {"const": "ClusterIP"}, "rayStartParams": TEXTS, "template": TEMPLATE},
            *("serviceType", "rayStartParams", "template"),
        ),
        "workerGroupSpecs": {"type": "array", "items": WORKERS, "minItems": 1},
    },
    *("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
)
RAY_JOB = closed(
    {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        "backoffLimit": {"type": "integer"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer"},
        "runtimeEnvYAML": {"type": "string"},
        "rayClusterSpec": RAY_CLUSTER,
        "submitterPodTemplate": TEMPLATE,
    },
    *("entrypoint", "rayClusterSpec"),
)


def manifest(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The Ray resource, the spec of its cluster, and the network policy."""
    ray, policy = documents(name)
    spec = ray["spec"]
    return ray, spec.get("rayClusterSpec", spec), policy["spec"]


@pytest.mark.parametrize(("name", "schema"), list(zip(MANIFESTS, (RAY_CLUSTER, RAY_JOB), strict=True)))
def test_manifests_have_fields_that_kuberay_has(name: str, schema: dict[str, Any]) -> None:
    """The schema holds the fields used here as KubeRay's v1 API types declare them, and refuses others."""
    import jsonschema

    ray, cluster, _ = manifest(name)
    assert (
        ray["apiVersion"] == "ray.io/v1"
        and ray["kind"] == {0: "RayCluster", 1: "RayJob"}[MANIFESTS.index(name)]
    )
    jsonschema.validate(ray["spec"], schema)
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # KubeRay's are texts
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate(ray["spec"], schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_a_head_with_an_autoscaler_may_ask_kubernetes(name: str) -> None:
    """And a cluster that makes nodes begins with none, as those of the launcher do."""
    ray, cluster, _ = manifest(name)
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    denied = [pod["template"]["spec"].get("automountServiceAccountToken", True) is False for pod in pods]
    scales = cluster.get("enableInTreeAutoscaling", False)
    assert scales == (ray["kind"] == "RayCluster")
    assert denied == [not scales] + [True] * (len(pods) - 1)
    if ray["kind"] == "RayJob":
        assert ray["spec"]["submitterPodTemplate"]["spec"]["automountServiceAccountToken"] is False
    for group in cluster["workerGroupSpecs"]:
        least = group["minReplicas"]
        assert group["replicas"] == least and (least == 0) == scales and group["maxReplicas"] >= max(1, least)


@pytest.mark.parametrize("name", MANIFESTS)
def test_mounts_name_volumes_and_limits_equal_requests(name: str) -> None:
    _, cluster, _ = manifest(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_the_clusters_own_pods_reach_its_ports(name: str) -> None:
    ray, cluster, policy = manifest(name)
    [own] = policy["podSelector"]["matchLabels"].items()
    if ray["kind"] == "RayCluster":
        assert own == ("ray.io/cluster", ray["metadata"]["name"])  # a label that KubeRay gives
        assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    else:
        templates = [cluster["headGroupSpec"]["template"], ray["spec"]["submitterPodTemplate"]]
        templates += [group["template"] for group in cluster["workerGroupSpecs"]]
        assert all(own in template["metadata"]["labels"].items() for template in templates)
    [rule] = policy["ingress"]
    assert [source["podSelector"]["matchLabels"] for source in rule["from"]] == [
        dict([own]),
        {"app.kubernetes.io/name": "kuberay-operator"},
    ]


def test_the_job_of_a_manifest_is_a_command_we_have() -> None:
    import shlex

    import click

    from minitron_ray.cli import main

    ray, _, _ = manifest("kuberay-rayjob.yaml")
    program, command, *arguments = shlex.split(ray["spec"]["entrypoint"])
    assert program == "minitron-ray"
    parent = click.Context(main, info_name=program, **main.context_settings)  # click keeps the parent's -h
    with main.commands[command].make_context(command, arguments, parent) as context:
        assert (context.params["address"], context.params["results"]) == (
            "$RAY_ADDRESS",
            Path("/shared/results"),
        )


# --- Scripts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    script = CLUSTER / name
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert script.stat().st_mode & 0o111 == 0o111
    text = script.read_text()
    assert "RAY_AUTH_MODE=token" in text and "--dashboard-host=127.0.0.1" in text and "umask 077" in text
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and name in done.stderr


def test_slurm_directives_come_first_and_ask_for_a_signal_in_time() -> None:
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line in lines[:command] for line in directives)  # sbatch stops reading at the first command
    options = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in directives)  # type: ignore[union-attr]
    assert options["signal"] == "B:TERM@600" and {"requeue", "no-kill"} <= options.keys()
    assert int(options["nodes"]) > 1 and options["ntasks-per-node"] == "1"
