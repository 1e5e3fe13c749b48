"""The configuration that Compose computes, for every combination of profiles; no container is started."""

import itertools
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
import yaml
from containers import DOCKERFILE, IMAGES, REPOSITORY, VERSION

from compose import BUILD_ARGUMENTS, PROFILES, Project, variables
from entrypoints.__main__ import COMMANDS, parse_arguments
from entrypoints.api.admission import Admission
from entrypoints.api.metrics import Metrics
from entrypoints.settings import Secret, Settings
from entrypoints.training.flags import parse_train_arguments

SERVICES = {
    "": {"model-init", "api", "web", "web-streamlit"},
    "cpu": {"model-init", "api", "web", "web-streamlit"},
    "gpu": {"model-init-plain", "api-gpu", "web", "web-streamlit"},
    "gpu-int4": {"model-init-plain", "api-gpu-int4", "web", "web-streamlit"},
    "embeddings": {"embeddings"},
    "train": {"model-init-plain", "train", "web-training"},
    "train-multi": {"model-init-plain", "train-0", "train-1", "web-training"},
    "train-node": {"model-init-plain", "train-node"},
    "eval": {"model-init-plain", "evaluate"},
    "backup": {"backup"},
    "monitoring": {"prometheus", "grafana"},
    "proxy": {"proxy"},
}  # fmt: skip
# none, each one, each pair, and all
CHOICES = [*(choice for n in range(3) for choice in itertools.combinations(PROFILES, n)), PROFILES]
ALL = set().union(*SERVICES.values())
GLM_SERVICES = ALL - {"prometheus", "grafana", "proxy"}
LIBRARIES = {  # read by libraries
    "HF_HUB_OFFLINE", "HTTPS_PROXY", "NO_PROXY", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
}  # fmt: skip


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    """All services."""
    found = Project("glm-test", PROFILES).config()["services"]
    assert set(found) == ALL
    return found


def reserved_gpus(profiles: tuple[str, ...], **environment: object) -> dict[str, list]:
    """The GPU reservations by service."""
    found = Project("glm-test", profiles, **environment).config()["services"]
    devices = {
        name: service["deploy"]["resources"].get("reservations", {}).get("devices") for name, service in found.items()
    }
    return {name: reserved for name, reserved in devices.items() if reserved}


@pytest.mark.parametrize("profiles", CHOICES, ids="+".join)
def test_a_combination_of_profiles_is_valid_and_has_its_services(profiles):
    found = set(Project("glm-test", profiles).config()["services"])
    assert found == set().union(*(SERVICES[name] for name in profiles or ("",)))


@pytest.mark.parametrize("profiles", [(), ("cpu",), ("monitoring",), ("proxy",), ("cpu", "monitoring", "proxy")])
def test_no_gpu_is_reserved_without_a_gpu_profile_even_if_gpu_variables_are_set(profiles):
    assert reserved_gpus(profiles) == {}
    assert reserved_gpus(profiles, NUM_GPUS=8, GPU_IDS="0,1") == {}


@pytest.mark.parametrize(("profile", "name"), [("gpu", "api-gpu"), ("gpu-int4", "api-gpu-int4")])
def test_a_gpu_profile_reserves_by_count_or_by_id_and_never_by_both(profile, name):
    device = {"capabilities": ["gpu"], "driver": "nvidia"}
    assert reserved_gpus((profile,)) == {name: [{**device, "count": 1}]}
    assert reserved_gpus((profile,), NUM_GPUS=2) == {name: [{**device, "count": 2}]}
    assert reserved_gpus((profile,), GPU_IDS="0,3") == {name: [{**device, "device_ids": ["0,3"]}]}
    assert reserved_gpus((profile,), GPU_IDS="0,3", NUM_GPUS=2) == {name: [{**device, "device_ids": ["0,3"]}]}


def test_training_reserves_gpus_only_if_their_number_is_set():
    profiles = ("train", "train-multi", "train-node", "eval")
    names = ("train", "train-0", "train-1", "train-node", "evaluate")
    assert reserved_gpus(profiles) == reserved_gpus(profiles, NUM_GPUS="") == reserved_gpus(profiles, NUM_GPUS=0) == {}
    for count in range(1, 17):
        reserved = reserved_gpus(profiles, NUM_GPUS=count)
        assert {name: devices[0]["count"] for name, devices in reserved.items()} == dict.fromkeys(names, count)
    too_many = Project("glm-test", profiles, NUM_GPUS=17).compose("config", check=False)
    assert 'service "trained-on-17-gpus" not found' in too_many.stderr
    some = reserved_gpus(profiles, NUM_GPUS=2, GPU_IDS="4,5")
    assert {name: devices[0]["device_ids"] for name, devices in some.items()} == {name: ["4,5"] for name in names}
    for count, device in ((8, "auto"), (0, "cpu")):
        command = Project("glm-test", profiles, NUM_GPUS=count).config()["services"]["train"]["command"]
        arguments = parse_train_arguments(parse_arguments(command)[1], Settings())
        assert (arguments.num_gpus, arguments.device) == (count, device)


def test_a_model_is_prepared_with_the_family_that_is_set(services):
    named = Project("glm-test", PROFILES, FAMILY="chatglm2").config()["services"]
    for name in ("model-init", "model-init-plain"):
        without, with_family = services[name]["command"], named[name]["command"]
        assert parse_arguments(without)[1].family is None
        assert with_family == [*without, "--family", "chatglm2"]


def test_every_service_is_restricted(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "container_name", "pid", "cap_add", "devices"} & set(service), name
        assert service.get("network_mode") == ("host" if name == "train-node" else None), name
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), name
        assert any(entry.startswith("/tmp") for entry in service["tmpfs"]), name
        assert int(service["deploy"]["resources"]["limits"]["memory"]) >= 128 << 20, name
        assert service["logging"]["options"] == {"max-size": "20m", "max-file": "5"}, name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
    assert sum(len(service.get("ports", [])) for service in services.values()) == 10


def test_only_the_service_that_prepares_models_can_write_them(services):
    writers = {
        name: {mount["target"] for mount in service.get("volumes", []) if not mount.get("read_only")}
        for name, service in services.items()
    }
    assert {name: targets for name, targets in writers.items() if targets} == {
        "model-init": {"/models"},
        "model-init-plain": {"/models"},
        **{name: {"/outputs"} for name in ("train", "train-0", "train-1", "train-node", "evaluate")},
        "api": {"/usage", "/prefixes"},
        **{name: {"/usage"} for name in ("api-gpu", "api-gpu-int4", "embeddings")},
        **{name: {"/pages"} for name in ("web", "web-streamlit")},
        "backup": {"/outputs", "/usage", "/pages"},
        "prometheus": {"/prometheus"},
        "grafana": {"/var/lib/grafana"},
    }


def test_no_secret_is_in_the_environment(services):
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            secret = re.search("KEY|TOKEN|PASSWORD|SECRET", variable)
            assert not secret or (variable.endswith("_FILE") and re.match("(/run/secrets/|$)", value)), (name, variable)
            if secret and value:
                assert value.rpartition("/")[2] in {entry["source"] for entry in service["secrets"]}, (name, variable)


def test_a_key_file_is_mounted_as_a_secret_and_named_only_if_there_is_one(services):
    """An empty key file would lock everybody out."""
    for profile, name in (("cpu", "api"), ("gpu", "api-gpu"), ("gpu-int4", "api-gpu-int4"), ("embeddings",) * 2):
        assert services[name]["environment"]["API_KEYS_FILE"] == ""
        found = Project("glm-test", (profile,), API_KEYS_FILE="/srv/keys.txt").config()
        assert found["services"][name]["environment"]["API_KEYS_FILE"] == "/run/secrets/api-keys"
        assert found["secrets"]["api-keys"]["file"] == "/srv/keys.txt"


def test_metrics_need_a_key_where_requests_do_and_prometheus_sends_it(services):
    for name in ("api", "api-gpu", "api-gpu-int4", "embeddings"):
        assert "--metrics-need-key" in services[name]["command"], name
    scrapes = yaml.safe_load((REPOSITORY / "compose/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert [each["authorization"] for each in scrapes] == [{"credentials_file": "/run/secrets/api-key"}] * 2
    assert [entry["target"] for entry in services["prometheus"]["secrets"]] == ["/run/secrets/api-key"]
    assert services["prometheus"]["user"].endswith(":0"), "the group for which documented secrets are readable"


def test_the_chat_pages_keep_conversations_and_ratings_where_the_operator_decides():
    given = {"CONVERSATIONS": "server", "FEEDBACK_DIR": "/pages/feedback", "PAGE_USERS_FILE": "/srv/users.txt"}
    for change, expected in (
        ({}, ("browser", "", "")),
        (given, ("server", "/pages/feedback", "/run/secrets/page-users")),
    ):
        found = Project("glm-test", ("cpu",), **change).config()["services"]
        for name in ("web", "web-streamlit"):
            environment = found[name]["environment"]
            names = ("CONVERSATIONS", "FEEDBACK_DIR", "PAGE_USERS_FILE")
            assert tuple(environment[each] for each in names) == expected
            assert [mount["target"] for mount in found[name]["volumes"]] == [environment["PAGE_STATE_DIR"]]


def test_every_variable_is_a_known_setting(services):
    known = {f.name.upper() for f in fields(Settings)}
    known |= {f"{f.name.upper()}_FILE" for f in fields(Settings) if f.type is Secret}
    for name in GLM_SERVICES:
        assert set(services[name]["environment"]) <= known | LIBRARIES, name


def test_every_command_parses(services):
    for name in GLM_SERVICES - {"backup"}:
        job, _ = parse_arguments(services[name]["command"])
        assert job.__name__.rpartition(".")[2] in COMMANDS, name


def test_dependencies_wait_for_health_and_grace_periods_exceed_the_drain_time(services):
    for name in ("api", "api-gpu", "api-gpu-int4", "embeddings"):
        assert "healthcheck" not in services[name], "the image has one"
        job, args = parse_arguments(services[name]["command"])
        assert job.__name__.endswith("serve")
        assert _seconds(services[name]["stop_grace_period"]) > args.drain_seconds
    for name in ("train", "train-0", "train-1"):
        assert _seconds(services[name]["stop_grace_period"]) > 1800
        assert int(services[name]["shm_size"]) >= 8 << 30
    for page in ("web", "web-streamlit"):
        needed = services[page]["depends_on"]
        assert {name: entry["condition"] for name, entry in needed.items()} == dict.fromkeys(
            ("api", "api-gpu", "api-gpu-int4"), "service_healthy"
        )
    assert "depends_on" not in services["embeddings"], "its model is a file of the user"
    others = {"backup", "model-init", "model-init-plain", "embeddings", "web", "web-streamlit", "web-training"}
    for name in GLM_SERVICES - others:
        assert {entry["condition"] for entry in services[name]["depends_on"].values()} == {
            "service_completed_successfully"
        }, name


def test_services_use_the_built_and_the_pinned_images(services):
    pins = dict(re.findall(r"^([A-Z_]+)=(.+)$", (REPOSITORY / "images" / "pins.env").read_text(), re.MULTILINE))
    foreign = {"prometheus": "PROMETHEUS_IMAGE", "grafana": "GRAFANA_IMAGE", "proxy": "NGINX_IMAGE"}
    for name, service in services.items():
        if name in foreign:
            assert service["image"] == pins[foreign[name]]
            assert re.search(r":v?\d+\.\d+", service["image"])
        else:
            image = re.fullmatch(rf"glm-([a-z-]+):{re.escape(VERSION)}", service["image"])[1]
            assert image in IMAGES
            assert service["build"]["dockerfile"] == "images/Dockerfile"
            assert service["build"]["target"] == service["build"]["args"]["IMAGE"] == image
    prefixed = Project("glm-test", IMAGE_PREFIX="registry.example.com/llm/").config()["services"]
    assert prefixed["api"]["image"] == f"registry.example.com/llm/glm-infer-quantized:{VERSION}"


def test_every_build_gets_its_arguments_and_secrets():
    given = {name: f"my-{name}" for name in BUILD_ARGUMENTS}
    built = Project("glm-test", PROFILES, **given).config()["services"]
    for name in GLM_SERVICES:
        args = {key: value for key, value in built[name]["build"]["args"].items() if key != "IMAGE"}
        assert args == {key: given[key] for key in args}
        assert all(f"ARG {key}" in DOCKERFILE.read_text() for key in args), name
        assert {"BASE_IMAGE", "PIP_INDEX_URL", "DEBIAN_MIRROR"} <= set(args), name
        assert {secret["source"] for secret in built[name]["build"]["secrets"]} == {"ca", "pip"}


def test_the_example_lists_every_variable_with_a_comment_and_its_default():
    lines = (REPOSITORY / ".env.example").read_text(encoding="utf-8").splitlines()
    listed, found = {}, []
    for before, line in itertools.pairwise(lines):
        if assignment := re.fullmatch(r"#?([A-Z_]+)=(.*)", line):
            assert re.match("# .{4}", before), line
            listed[assignment[1]] = assignment[2]
    pinned = {"PROMETHEUS_IMAGE", "GRAFANA_IMAGE", "NGINX_IMAGE"}
    assert set(listed) == (variables() - pinned) | {"COMPOSE_PROFILES"}
    assert Project("glm-test", PROFILES, **{**listed, "COMPOSE_PROFILES": ""}).config()["services"].keys() == ALL
    shown = {name: value for name, value in listed.items() if f"{name}={value}" in lines and name != "COMPOSE_PROFILES"}
    for change in ({}, shown):
        found.append(Project("glm-test", PROFILES, **change).config())
        for service in found[-1]["services"].values():
            service.pop("labels", None)  # file names of the secrets, which differ if the default is written out
    assert found[0] == found[1]


def test_relative_paths_start_at_the_repository_root():
    found = Project("glm-test", PROFILES, FOLDERS_DIR="./here", DATA_DIR="./rows", API_KEY_FILE="./key").config()
    mounts = {
        name: [entry["source"] for entry in found["services"][name]["volumes"]] for name in ("model-init", "train")
    }
    assert f"{REPOSITORY}/here" in mounts["model-init"]
    assert f"{REPOSITORY}/rows" in mounts["train"]
    assert found["secrets"]["api-key"]["file"] == f"{REPOSITORY}/key"


def test_dashboard_and_rules_use_only_metrics_of_the_api():
    text = Metrics([Admission(1, 1)]).text().decode()
    exposed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    for file in ("compose/prometheus/rules.yml", "k8s/components/dashboard/glm.json"):
        used = set(re.findall(r"\bglm_[a-z_]+", (REPOSITORY / file).read_text(encoding="utf-8")))
        assert len(used) >= 3, file
        assert {re.sub("_(bucket|count|sum)$", "", name) for name in used} <= exposed, file


def test_the_alert_rules_equal_those_of_kubernetes():
    rules = yaml.safe_load((REPOSITORY / "compose/prometheus/rules.yml").read_text(encoding="utf-8"))
    manifest = yaml.safe_load((REPOSITORY / "k8s/components/monitoring/rules.yaml").read_text(encoding="utf-8"))
    assert rules == manifest["spec"]
    assert len(rules["groups"][0]["rules"]) >= 4


def test_prometheus_accepts_its_configuration(tmp_path):
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed; apt-get install prometheus")
    folder = shutil.copytree(REPOSITORY / "compose" / "prometheus", tmp_path / "prometheus")
    file, secret = folder / "prometheus.yml", folder / "key"
    secret.write_text("")
    file.write_text(file.read_text().replace("/run/secrets/api-key", str(secret)))
    done = subprocess.run([promtool, "check", "config", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 rules found" in done.stdout


def _seconds(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))
