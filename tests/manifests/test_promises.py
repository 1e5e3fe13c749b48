"""What k8s/README.md promises, read from the rendered objects. Traps K1 to K7 of the list of reported pains."""

import re
from dataclasses import fields

import yaml
from manifests import (
    OVERLAYS,
    REPOSITORY,
    amount,
    container,
    containers,
    environment,
    objects,
    one,
    pod_template,
    pods,
    words,
)

from entrypoints.api.uvicorn_server import LAST_SECONDS
from entrypoints.settings import Settings

OURS = {field.name.upper() for field in fields(Settings)}
LIBRARIES = {"NVIDIA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "NNODES", "MASTER_ADDR", "MASTER_PORT"}
PORTS = {"api": 8000, "web": 7860, "web-streamlit": 8501, "web-training": 8502, "tensorboard": 6006}


def test_the_namespace_enforces_the_restricted_standard_and_every_overlay_has_its_own():
    names = []
    for overlay in OVERLAYS:
        (namespace,) = (thing for thing in objects(overlay) if thing["kind"] == "Namespace")
        labels = namespace["metadata"]["labels"]
        assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}
        names.append(namespace["metadata"]["name"])
        others = {each["metadata"]["namespace"] for each in objects(overlay) if each is not namespace}
        assert others == {names[-1]} == {f"glm-{overlay}"}
    assert len(set(names)) == 6


def test_every_pod_meets_the_restricted_standard(templates):
    allowed = {
        "name",
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for name, template in templates:
        spec, security = template["spec"], template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert {*security} == {
            "runAsNonRoot",
            "runAsUser",
            "runAsGroup",
            "fsGroup",
            "fsGroupChangePolicy",
            "seccompProfile",
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & {*spec}, name
        assert all({*volume} <= allowed for volume in spec["volumes"]), name
        for each in containers(template):
            inner = each["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False and inner["capabilities"] == {"drop": ["ALL"]}, name
            assert {*inner} == {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}, name
            assert "hostPort" not in str(each.get("ports")) and "host'" not in str(each.get("readinessProbe")), name


def test_the_root_file_system_is_read_only_and_what_is_written_is_declared(templates):
    for name, template in templates:
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for each in containers(template):
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
            mounts = {mount["mountPath"]: mount for mount in each["volumeMounts"]}
            assert {"/tmp", "/home/glm"} <= {*mounts}, (name, each["name"])
            assert {mount["name"] for mount in mounts.values()} <= {*volumes}
            for path in ("/models", "/data", "/run/secrets"):
                writer = {"/models": "model-init", "/data": "upload"}.get(path)
                assert path not in mounts or mounts[path].get("readOnly") or each["name"] == writer, (name, path)
        assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume)


def test_memory_that_is_a_disk_is_counted_and_so_is_disk(templates):
    """K4 and K6."""
    shared = 0
    for name, template in templates:
        empty = {each["name"]: each["emptyDir"] for each in template["spec"]["volumes"] if "emptyDir" in each}
        disk = sum(amount(each["sizeLimit"]) for each in empty.values() if each.get("medium") != "Memory")
        limits = [each["resources"]["limits"] for each in containers(template)]
        assert disk <= max(amount(each["ephemeral-storage"]) for each in limits), name
        if "shm" in empty:
            shared += 1
            assert empty["shm"]["medium"] == "Memory"
            largest = max(amount(each["memory"]) for each in limits)
            assert 2 << 30 <= amount(empty["shm"]["sizeLimit"]) <= largest / 4, name
        gpus = max(each.get("nvidia.com/gpu", 0) for each in limits)
        assert gpus <= 1 or "shm" in empty, name
    assert shared >= 15


def test_no_pod_holds_a_token_or_is_told_of_services(templates):
    for name, template in templates:
        assert template["spec"]["automountServiceAccountToken"] is False, name
        assert template["spec"]["enableServiceLinks"] is False, name
        assert template["spec"]["serviceAccountName"] == "glm", name


def test_secrets_are_named_and_never_written(every):
    assert "Secret" not in {thing["kind"] for thing in every}
    found = set()
    for _, template in pods(every):
        found |= {volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume}
        found |= {source["secretRef"]["name"] for each in containers(template) for source in each.get("envFrom", ())}
    found |= {entry["secretName"] for thing in every if thing["kind"] == "Ingress" for entry in thing["spec"]["tls"]}
    assert found == {"api-keys", "pages", "hub", "tls"}
    for readme in ("README.md", "README.zh-CN.md"):
        text = (REPOSITORY / "k8s" / readme).read_text(encoding="utf-8")
        assert all(re.search(rf"create secret (generic|tls) {name}\b", text) for name in found), readme


def test_every_variable_is_one_of_settings_or_stands_in_a_command(templates):
    for name, template in templates:
        for each in containers(template):
            text = f"{each.get('args')}{[entry.get('value') for entry in each['env']]}"
            known = OURS | LIBRARIES | {entry["name"] for entry in each["env"] if f"$({entry['name']})" in text}
            assert {entry["name"] for entry in each["env"]} <= known, (name, each["name"])


def test_every_variable_in_a_command_is_known_there(templates):
    """A variable sees only those before it; an unknown one stays as $(NAME)."""
    for name, template in templates:
        for each in containers(template):
            filled = environment(each)
            assert not [value for value in filled.values() if "$(" in value], (name, each["name"])
            asked = set(re.findall(r"\$\((\w+)\)", f"{each.get('args')}"))
            assert asked <= set(filled), (name, each["name"])


def test_no_pod_starts_on_an_unverified_model(templates):
    checked = 0
    for name, template in templates:
        for each in template["spec"]["containers"]:
            if "MODEL_PATH" in environment(each):
                first = template["spec"]["initContainers"][0]
                assert first["args"][:2] == ["verify", "$(MODEL_PATH)"], name
                path, loaded = environment(first)["MODEL_PATH"], environment(each)["MODEL_PATH"]
                assert path.removeprefix("/models/") == loaded.removeprefix("/models/").removeprefix("/cache/"), name
                checked += 1
    assert checked >= 25


def test_probes_give_ten_minutes_to_load_and_tell_ready_from_alive(templates):
    """K3."""
    servers = [container(template, "api") for name, template in templates if name.startswith("Deployment/api")]
    assert len(servers) >= 10
    for server in servers:
        startup = server["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] == 600
        assert startup["httpGet"]["path"] == server["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert server["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_a_pod_has_time_to_drain(templates):
    for name, template in templates:
        for server in (each for each in template["spec"]["containers"] if each["name"] == "api"):
            drain = int(server["args"][server["args"].index("--drain-seconds") + 1])
            pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
            assert template["spec"]["terminationGracePeriodSeconds"] > pause + drain + LAST_SECONDS, name


def test_a_rollout_cannot_wait_for_a_gpu_that_it_holds_itself(every):
    """K2."""
    rollouts = [
        thing["spec"]["strategy"]["rollingUpdate"]
        for thing in every
        if thing["kind"] == "Deployment" and thing["metadata"]["name"].startswith("api")
    ]
    assert len(rollouts) >= 10
    assert all(each == {"maxSurge": 0, "maxUnavailable": 1} for each in rollouts)


def test_two_replicas_have_a_budget_a_spread_and_a_scaler():
    things = objects("production")
    api = one(things, "Deployment", "api")
    assert "replicas" not in api["spec"]  # the scaler's
    scaler = one(things, "HorizontalPodAutoscaler", "api")["spec"]
    assert scaler["minReplicas"] == 2
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "glm_queue_length"
    budget = one(things, "PodDisruptionBudget", "api")["spec"]
    assert budget["maxUnavailable"] == 1
    spread = api["spec"]["template"]["spec"]["topologySpreadConstraints"][0]
    labels = api["spec"]["selector"]["matchLabels"]
    assert labels == budget["selector"]["matchLabels"] == spread["labelSelector"]["matchLabels"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"


def test_traffic_is_denied_but_for_the_arrows_that_exist(every):
    for overlay in OVERLAYS:
        deny = one(objects(overlay), "NetworkPolicy", "default-deny")["spec"]
        assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    names = {thing["metadata"]["name"] for thing in every if thing["kind"] == "NetworkPolicy"}
    assert names == {
        "default-deny",
        "names",
        "model-init",
        "api",
        "train",
        "from-outside",
        "from-monitoring",
        "web",
        "web-streamlit",
    }
    (api,) = one(objects("demo"), "NetworkPolicy", "api")["spec"]["ingress"]
    assert api["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/component": "page"}}}]


def test_every_selector_finds_pods():
    for overlay in OVERLAYS:
        labels = [template["metadata"]["labels"].items() for _, template in pods(objects(overlay))]
        for service in (thing for thing in objects(overlay) if thing["kind"] == "Service"):
            assert any(service["spec"]["selector"].items() <= each for each in labels), service["metadata"]["name"]


def test_a_canary_answers_beside_the_others_with_its_own_model_under_their_name(used):
    service = one(used("canary"), "Service", "api")["spec"]["selector"]
    budget = one(used("canary"), "PodDisruptionBudget", "api")["spec"]["selector"]["matchLabels"]
    for name, model, filler in (("api", "demo", "model-init"), ("api-canary", "tuned", "canary-init")):
        spec = one(used("canary"), "Deployment", name)["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        assert service.items() <= labels.items()
        assert (budget.items() <= labels.items()) == (name == "api")
        loaded = [environment(each)["MODEL_PATH"] for each in containers(spec["template"])]
        assert loaded == [f"/models/{model}"] * 2
        assert environment(container(spec["template"], "api"))["SERVED_NAME"] == "demo"
        job = one(used("canary"), "Job", filler)["spec"]["template"]
        assert words(container(job, "model-init")) == ["prepare", model, "/models"]
    assert one(used("canary"), "Deployment", "api-canary")["spec"]["replicas"] == 1


def test_ports_and_names_are_those_of_the_commands_and_of_compose(every):
    services = {
        thing["metadata"]["name"]: thing["spec"]
        for thing in every
        if thing["kind"] == "Service" and thing["metadata"]["name"] != "train"
    }
    assert {name: spec["ports"][0]["port"] for name, spec in services.items()} == PORTS
    for name, template in pods(every):
        for each in (each for each in containers(template) if "--port" in each.get("args", ())):
            port = int(each["args"][each["args"].index("--port") + 1])
            assert each["ports"][0]["containerPort"] == port == PORTS[each["name"]], name
    compose = yaml.safe_load((REPOSITORY / "compose" / "serve.yaml").read_text(encoding="utf-8"))["services"]
    assert {"api", "model-init", "web", "web-streamlit"} <= set(compose) & {
        name.partition("/")[2] for name, _ in pods(every)
    }
    assert (
        environment(container(pod_template(one(objects("demo"), "Deployment", "web")), "web"))["API_URL"]
        == "http://api:8000/v1"
    )


def test_pages_keep_their_visitors_and_answers_are_not_held_back(used):
    things = objects("production")
    assert one(things, "Service", "web")["spec"]["sessionAffinity"] == "ClientIP"
    for name in ("api", "web"):
        notes = one(things, "Ingress", name)["metadata"]["annotations"]
        assert notes["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
        assert int(notes["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= 3600
        route = one(used("gateway"), "HTTPRoute", name)["spec"]["rules"][0]
        assert route["timeouts"] == {"request": "0s", "backendRequest": "0s"}


def test_images_carry_the_packages_version(every):
    import tomllib

    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    built = {folder.parent.name for folder in (REPOSITORY / "images").glob("*/Dockerfile")}
    images = {each["image"] for _, template in pods(every) for each in containers(template)}
    assert images == {f"glm-{name}:{version}" for name in built}
