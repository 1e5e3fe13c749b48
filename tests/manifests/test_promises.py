"""Properties that k8s/README.md promises, read from the rendered objects."""

import re
from dataclasses import fields

import yaml
from containers import IMAGES, VERSION
from manifests import (
    OVERLAYS,
    REPOSITORY,
    amount,
    arguments,
    container,
    containers,
    environment,
    objects,
    one,
    pod_template,
    pods,
)

from entrypoints.api.server import FINAL_RESPONSE_SECONDS
from entrypoints.settings import Settings

SETTING_NAMES = {field.name.upper() for field in fields(Settings)}
LIBRARIES = {"NVIDIA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "NNODES", "MASTER_ADDR", "MASTER_PORT"}
PORTS = {"api": 8000, "embeddings": 8000, "web": 7860, "web-streamlit": 8501, "web-training": 8502, "tensorboard": 6006}


def test_the_namespace_enforces_the_restricted_standard_and_every_overlay_has_its_own():
    names = []
    for overlay in OVERLAYS:
        (namespace,) = (manifest for manifest in objects(overlay) if manifest["kind"] == "Namespace")
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
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001), name
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
            assert inner["allowPrivilegeEscalation"] is False, name
            assert inner["capabilities"] == {"drop": ["ALL"]}, name
            assert {*inner} == {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}, name
            assert "hostPort" not in str(each.get("ports")), name
            assert "host'" not in str(each.get("readinessProbe")), name


def test_the_root_file_system_is_read_only_and_writable_paths_are_mounts(templates):
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


def test_emptydir_sizes_are_within_the_limits_of_the_container(templates):
    """An emptyDir above the limits gets the pod evicted, or killed if it is in memory."""
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
        gpus = max(int(each.get("nvidia.com/gpu", 0)) for each in limits)
        assert gpus <= 1 or "shm" in empty, name
    assert shared >= 15


def test_no_pod_has_a_service_account_token_or_service_links(templates):
    for name, template in templates:
        assert template["spec"]["automountServiceAccountToken"] is False, name
        assert template["spec"]["enableServiceLinks"] is False, name
        assert template["spec"]["serviceAccountName"] == "glm", name


def test_secrets_are_only_referenced(every):
    assert "Secret" not in {manifest["kind"] for manifest in every}
    found = set()
    for _, template in pods(every):
        found |= {volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume}
        found |= {source["secretRef"]["name"] for each in containers(template) for source in each.get("envFrom", ())}
    found |= {
        entry["secretName"] for manifest in every if manifest["kind"] == "Ingress" for entry in manifest["spec"]["tls"]
    }
    assert found == {"api-keys", "pages", "page-users", "hub", "tls"}
    for readme in ("README.md", "README.zh-CN.md"):
        text = (REPOSITORY / "k8s" / readme).read_text(encoding="utf-8")
        assert all(re.search(rf"create secret (generic|tls) {name}\b", text) for name in found), readme


def test_every_variable_is_a_setting_or_used_in_a_command(templates):
    for name, template in templates:
        for each in containers(template):
            text = f"{each.get('args')}{[entry.get('value') for entry in each['env']]}"
            known = (
                SETTING_NAMES | LIBRARIES | {entry["name"] for entry in each["env"] if f"$({entry['name']})" in text}
            )
            assert {entry["name"] for entry in each["env"]} <= known, (name, each["name"])


def test_every_variable_in_a_command_is_defined(templates):
    """A variable can only reference those before it; an undefined one stays as $(NAME)."""
    for name, template in templates:
        for each in containers(template):
            variables = environment(each)
            assert not [value for value in variables.values() if "$(" in value], (name, each["name"])
            used = set(re.findall(r"\$\((\w+)\)", f"{each.get('args')}"))
            assert used <= set(variables), (name, each["name"])


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


def test_probes_allow_ten_minutes_to_load_and_distinguish_ready_from_alive(templates):
    """Otherwise a slow disk would restart the server while it loads."""
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
            assert template["spec"]["terminationGracePeriodSeconds"] > pause + drain + FINAL_RESPONSE_SECONDS, name


def test_a_rollout_keeps_the_old_pod_until_the_new_one_is_ready_unless_there_is_no_room(every, used):
    """A pod that waits for its model, or for a GPU, must not stop the one that serves."""
    rollouts = [
        manifest["spec"]["strategy"]["rollingUpdate"]
        for manifest in every
        if manifest["kind"] == "Deployment" and manifest["metadata"]["name"].startswith("api")
    ]
    assert len(rollouts) >= 10
    other = one(used("no-surge"), "Deployment", "api")["spec"]["strategy"]["rollingUpdate"]
    assert other == {"maxSurge": 0, "maxUnavailable": 1}
    assert [each for each in rollouts if each != {"maxSurge": 1, "maxUnavailable": 0}] == [other]
    for manifest in every:
        if manifest["kind"] == "Deployment" and manifest["metadata"]["name"].startswith(("api", "model-init")):
            assert manifest["spec"]["progressDeadlineSeconds"] >= 7200 + 600, manifest["metadata"]["name"]


def test_two_replicas_have_a_disruption_budget_a_topology_spread_and_an_autoscaler():
    manifests = objects("production")
    api = one(manifests, "Deployment", "api")
    assert "replicas" not in api["spec"]  # set by the autoscaler
    autoscaler = one(manifests, "HorizontalPodAutoscaler", "api")["spec"]
    assert autoscaler["minReplicas"] == 2
    assert autoscaler["metrics"][0]["pods"]["metric"]["name"] == "glm_queue_length"
    budget = one(manifests, "PodDisruptionBudget", "api")["spec"]
    assert budget["maxUnavailable"] == 1
    spread = api["spec"]["template"]["spec"]["topologySpreadConstraints"][0]
    labels = api["spec"]["selector"]["matchLabels"]
    assert labels == budget["selector"]["matchLabels"] == spread["labelSelector"]["matchLabels"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"


def test_all_traffic_is_denied_except_what_a_network_policy_allows(every):
    for overlay in OVERLAYS:
        deny = one(objects(overlay), "NetworkPolicy", "default-deny")["spec"]
        assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    names = {manifest["metadata"]["name"] for manifest in every if manifest["kind"] == "NetworkPolicy"}
    assert names == {
        "default-deny",
        "names",
        "model-init",
        "api",
        "embeddings",
        "train",
        "from-clients",
        "from-outside",
        "from-monitoring",
        "web",
        "web-streamlit",
    }
    (api,) = one(objects("demo"), "NetworkPolicy", "api")["spec"]["ingress"]
    assert api["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/component": "page"}}}]


def test_every_service_selects_pods():
    for overlay in OVERLAYS:
        labels = [template["metadata"]["labels"].items() for _, template in pods(objects(overlay))]
        for service in (manifest for manifest in objects(overlay) if manifest["kind"] == "Service"):
            assert any(service["spec"]["selector"].items() <= each for each in labels), service["metadata"]["name"]


def test_a_canary_serves_its_own_model_behind_the_same_service_under_the_same_name(used):
    service = one(used("canary"), "Service", "api")["spec"]["selector"]
    budget = one(used("canary"), "PodDisruptionBudget", "api")["spec"]["selector"]["matchLabels"]
    for name, model, init in (("api", "demo", "model-init"), ("api-canary", "tuned", "canary-init")):
        spec = one(used("canary"), "Deployment", name)["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        assert service.items() <= labels.items()
        assert (budget.items() <= labels.items()) == (name == "api")
        loaded = [environment(each)["MODEL_PATH"] for each in containers(spec["template"])]
        assert loaded == [f"/models/{model}"] * 2
        assert environment(container(spec["template"], "api"))["SERVED_NAME"] == "chatglm3-6b"
        prepare = one(used("canary"), "Deployment", init)["spec"]
        assert prepare["selector"]["matchLabels"].items() <= prepare["template"]["metadata"]["labels"].items()
        assert arguments(container(prepare["template"], "model-init")) == ["prepare", model, "/models"]
    assert one(used("canary"), "Deployment", "api-canary")["spec"]["replicas"] == 1


def test_embeddings_are_a_service_of_their_own_that_chat_requests_do_not_reach(used):
    manifests = used("embeddings")
    labels = one(manifests, "Deployment", "embeddings")["spec"]["template"]["metadata"]["labels"]
    assert one(manifests, "Service", "embeddings")["spec"]["selector"].items() <= labels.items()
    assert not one(manifests, "Service", "api")["spec"]["selector"].items() <= labels.items()
    server = container(pod_template(one(manifests, "Deployment", "embeddings")), "api")
    assert arguments(server)[:3] == ["serve", "--embeddings", "/data/bge.gguf"]
    clients = one(manifests, "NetworkPolicy", "from-clients")["spec"]["podSelector"]["matchExpressions"]
    assert clients == [{"key": "app.kubernetes.io/component", "operator": "In", "values": ["api", "embeddings"]}]
    open_server = container(pod_template(one(used("no-keys-embeddings"), "Deployment", "embeddings")), "api")
    assert "API_KEYS_FILE" not in environment(open_server)
    assert arguments(open_server)[-2:] == ["--allowed-host=embeddings", "--insecure-no-auth"]


def test_ports_and_names_agree_with_the_commands_and_with_compose(every):
    services = {
        manifest["metadata"]["name"]: manifest["spec"]
        for manifest in every
        if manifest["kind"] == "Service" and manifest["metadata"]["name"] != "train"
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


def test_page_sessions_are_sticky_and_responses_are_not_buffered(used):
    manifests = objects("production")
    assert one(manifests, "Service", "web")["spec"]["sessionAffinity"] == "ClientIP"
    for name in ("api", "web"):
        annotations = one(manifests, "Ingress", name)["metadata"]["annotations"]
        assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
        assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= 3600
        route = one(used("gateway"), "HTTPRoute", name)["spec"]["rules"][0]
        assert route["timeouts"] == {"request": "0s", "backendRequest": "0s"}


def test_images_have_the_version_of_the_package(every):
    images = {each["image"] for _, template in pods(every) for each in containers(template)}
    assert images == {f"glm-{name}:{VERSION}" for name in IMAGES}
