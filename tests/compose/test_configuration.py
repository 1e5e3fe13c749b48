"""What Compose makes of the files, for every choice of profiles: no container is started."""

import itertools
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
import yaml
from containers import REPOSITORY, VERSION

from compose import PROFILES, Project, variables
from entrypoints.__main__ import JOBS, _parse
from entrypoints.api.limits import Admission
from entrypoints.api.metrics import Metrics
from entrypoints.settings import Secret, Settings

SERVICES = {
    "": {"model-init", "api", "web", "web-streamlit"},
    "cpu": {"model-init", "api", "web", "web-streamlit"},
    "gpu": {"model-init-plain", "api-gpu", "web", "web-streamlit"},
    "gpu-int4": {"model-init-plain", "api-gpu-int4", "web", "web-streamlit"},
    "train": {"model-init-plain", "train", "web-training"},
    "train-multi": {"model-init-plain", "train-0", "train-1", "web-training"},
    "eval": {"model-init-plain", "evaluate"},
    "monitoring": {"prometheus", "grafana"},
    "proxy": {"proxy"},
}  # fmt: skip
# none, each, each two, and all
CHOICES = [*(choice for n in range(3) for choice in itertools.combinations(PROFILES, n)), PROFILES]
ALL = set().union(*SERVICES.values())
OURS = ALL - {"prometheus", "grafana", "proxy"}
BUILD_ARGUMENTS = ("BASE_IMAGE", "PIP_INDEX_URL", "TORCH_INDEX", "TORCH_FLAVOUR", "LLAMACPP_CPU", "DEBIAN_MIRROR")
LIBRARIES = {"HF_HUB_OFFLINE", "HTTPS_PROXY", "NO_PROXY", "NNODES", "NODE_RANK", "MASTER_ADDR"}  # not settings of ours


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    """Every service there is."""
    found = Project("glm-test", PROFILES).config()["services"]
    assert set(found) == ALL
    return found


def gpus(profiles: tuple[str, ...], **environment: object) -> dict[str, list]:
    """The GPU reservations of a choice of profiles, by service."""
    found = Project("glm-test", profiles, **environment).config()["services"]
    devices = {
        name: service["deploy"]["resources"].get("reservations", {}).get("devices") for name, service in found.items()
    }
    return {name: asked for name, asked in devices.items() if asked}


@pytest.mark.parametrize("profiles", CHOICES, ids="+".join)
def test_a_choice_of_profiles_is_valid_and_brings_its_services(profiles):
    found = set(Project("glm-test", profiles).config()["services"])
    assert found == set().union(*(SERVICES[name] for name in profiles or ("",)))


@pytest.mark.parametrize("profiles", [(), ("cpu",), ("monitoring",), ("proxy",), ("cpu", "monitoring", "proxy")])
def test_no_gpu_is_asked_for_without_a_gpu_profile_even_when_numbers_are_set(profiles):
    assert gpus(profiles) == {}
    assert gpus(profiles, NUM_GPUS=8, GPU_IDS="0,1") == {}


@pytest.mark.parametrize(("profile", "name"), [("gpu", "api-gpu"), ("gpu-int4", "api-gpu-int4")])
def test_a_gpu_profile_asks_by_count_or_by_id_and_never_by_both(profile, name):
    asked = {"capabilities": ["gpu"], "driver": "nvidia"}
    assert gpus((profile,)) == {name: [{**asked, "count": 1}]}
    assert gpus((profile,), NUM_GPUS=2) == {name: [{**asked, "count": 2}]}
    assert gpus((profile,), GPU_IDS="0,3") == {name: [{**asked, "device_ids": ["0,3"]}]}
    assert gpus((profile,), GPU_IDS="0,3", NUM_GPUS=2) == {name: [{**asked, "device_ids": ["0,3"]}]}


def test_training_asks_for_gpus_only_when_their_number_is_set():
    profiles, names = ("train", "train-multi", "eval"), ("train", "train-0", "train-1", "evaluate")
    assert gpus(profiles) == {}
    eight = gpus(profiles, NUM_GPUS=8)
    assert {name: devices[0]["count"] for name, devices in eight.items()} == dict.fromkeys(names, 8)
    some = gpus(profiles, NUM_GPUS=2, GPU_IDS="4,5")
    assert {name: devices[0]["device_ids"] for name, devices in some.items()} == {name: ["4,5"] for name in names}
    command = Project("glm-test", profiles, NUM_GPUS=8).config()["services"]["train"]["command"]
    assert command[command.index("--num-gpus") + 1] == "8"


def test_every_service_is_confined(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "container_name", "network_mode", "pid", "cap_add", "devices"} & set(service), name
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), name
        assert any(entry.startswith("/tmp") for entry in service["tmpfs"]), name
        assert int(service["deploy"]["resources"]["limits"]["memory"]) >= 128 << 20, name
        assert service["logging"]["options"] == {"max-size": "20m", "max-file": "5"}, name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
    assert sum(len(service.get("ports", [])) for service in services.values()) == 9


def test_the_models_can_be_written_by_the_job_that_prepares_them_alone(services):
    writers = {
        name: {mount["target"] for mount in service.get("volumes", []) if not mount.get("read_only")}
        for name, service in services.items()
    }
    assert {name: targets for name, targets in writers.items() if targets} == {
        "model-init": {"/models"},
        "model-init-plain": {"/models"},
        **{name: {"/outputs"} for name in ("train", "train-0", "train-1", "evaluate")},
        "prometheus": {"/prometheus"},
        "grafana": {"/var/lib/grafana"},
    }


def test_no_secret_stands_in_the_environment(services):
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            secret = re.search("KEY|TOKEN|PASSWORD|SECRET", variable)
            assert not secret or (variable.endswith("_FILE") and value.startswith("/run/secrets/")), (name, variable)
            if secret:
                assert value.rpartition("/")[2] in {entry["source"] for entry in service["secrets"]}, (name, variable)


def test_variables_are_settings_of_ours_or_of_a_library(services):
    known = {f.name.upper() for f in fields(Settings)}
    known |= {f"{f.name.upper()}_FILE" for f in fields(Settings) if f.type is Secret}
    for name in OURS:
        assert set(services[name]["environment"]) <= known | LIBRARIES, name


def test_every_command_is_understood_by_its_job(services):
    for name in OURS:
        job, _ = _parse(services[name]["command"])
        assert job.__name__.rpartition(".")[2] in JOBS, name


def test_servers_are_awaited_and_given_time_to_end(services):
    for name in ("api", "api-gpu", "api-gpu-int4"):
        assert "healthcheck" not in services[name], "the image has one"
        job, args = _parse(services[name]["command"])
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
    for name in OURS - {"model-init", "model-init-plain", "web", "web-streamlit", "web-training"}:
        assert {entry["condition"] for entry in services[name]["depends_on"].values()} == {
            "service_completed_successfully"
        }, name


def test_images_are_the_pinned_ones(services):
    pins = dict(re.findall(r"^([A-Z_]+)=(.+)$", (REPOSITORY / "images" / "pins.env").read_text(), re.MULTILINE))
    foreign = {"prometheus": "PROMETHEUS_IMAGE", "grafana": "GRAFANA_IMAGE", "proxy": "NGINX_IMAGE"}
    for name, service in services.items():
        if name in foreign:
            assert service["image"] == pins[foreign[name]]
            assert re.search(r":v?\d+\.\d+", service["image"])
        else:
            folder = re.fullmatch(rf"glm-([a-z-]+):{re.escape(VERSION)}", service["image"])[1]
            assert service["build"]["dockerfile"] == f"images/{folder}/Dockerfile"
            assert (REPOSITORY / service["build"]["dockerfile"]).is_file()
    prefixed = Project("glm-test", IMAGE_PREFIX="registry.example.com/llm/").config()["services"]
    assert prefixed["api"]["image"] == f"registry.example.com/llm/glm-infer-quantized:{VERSION}"


def test_build_arguments_reach_every_dockerfile_that_knows_them(services):
    given = {name: f"my-{name}" for name in BUILD_ARGUMENTS}
    built = Project("glm-test", PROFILES, **given).config()["services"]
    for name in OURS:
        text = (REPOSITORY / built[name]["build"]["dockerfile"]).read_text()
        args = built[name]["build"]["args"]
        assert args == {key: given[key] for key in args}
        assert all(f"ARG {key}" in text for key in args), name
        assert {"BASE_IMAGE", "PIP_INDEX_URL", "DEBIAN_MIRROR"} <= set(args), name
        assert {secret["source"] for secret in built[name]["build"]["secrets"]} == {"ca", "pip"}


def test_the_example_names_every_variable_with_a_line_for_people_and_its_default():
    lines = (REPOSITORY / ".env.example").read_text(encoding="utf-8").splitlines()
    named, found = {}, []
    for before, line in itertools.pairwise(lines):
        if line_of := re.fullmatch(r"#?([A-Z_]+)=(.*)", line):
            assert before.startswith("# ") and len(before) > 5, line
            named[line_of[1]] = line_of[2]
    pinned = {"PROMETHEUS_IMAGE", "GRAFANA_IMAGE", "NGINX_IMAGE"}
    assert set(named) == (variables() - pinned) | {"COMPOSE_PROFILES"}
    assert Project("glm-test", PROFILES, **{**named, "COMPOSE_PROFILES": ""}).config()["services"].keys() == ALL
    shown = {name: value for name, value in named.items() if f"{name}={value}" in lines and name != "COMPOSE_PROFILES"}
    for change in ({}, shown):
        found.append(Project("glm-test", PROFILES, **change).config())
        for service in found[-1]["services"].values():
            service.pop("labels", None)  # names of the secrets' files, said or not
    assert found[0] == found[1]


def test_a_path_of_the_example_begins_at_the_root():
    found = Project("glm-test", PROFILES, FOLDERS_DIR="./here", DATA_DIR="./rows", API_KEY_FILE="./key").config()
    mounts = {
        name: [entry["source"] for entry in found["services"][name]["volumes"]] for name in ("model-init", "train")
    }
    assert f"{REPOSITORY}/here" in mounts["model-init"]
    assert f"{REPOSITORY}/rows" in mounts["train"]
    assert found["secrets"]["api-key"]["file"] == f"{REPOSITORY}/key"


def test_dashboard_and_rules_use_metrics_that_the_api_has():
    admission = Admission(1, 1)
    text = Metrics(admission, "engine", "model").text().decode()
    real = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    for file in ("compose/prometheus/rules.yml", "k8s/components/dashboard/glm.json"):
        used = set(re.findall(r"\bglm_[a-z_]+", (REPOSITORY / file).read_text(encoding="utf-8")))
        assert len(used) >= 3, file
        assert {re.sub("_(bucket|count|sum)$", "", name) for name in used} <= real, file


def test_the_alert_rules_are_those_of_the_cluster():
    ours = yaml.safe_load((REPOSITORY / "compose/prometheus/rules.yml").read_text(encoding="utf-8"))
    cluster = yaml.safe_load((REPOSITORY / "k8s/components/monitoring/rules.yaml").read_text(encoding="utf-8"))
    assert ours == cluster["spec"]
    assert len(ours["groups"][0]["rules"]) >= 4


def test_prometheus_accepts_its_configuration(tmp_path):
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("no promtool (apt-get install prometheus)")
    file = REPOSITORY / "compose" / "prometheus" / "prometheus.yml"
    done = subprocess.run([promtool, "check", "config", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 rules found" in done.stdout


def _seconds(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))
