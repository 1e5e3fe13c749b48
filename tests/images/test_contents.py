"""Contents of the images: user, environment, size, and no unwanted files."""

import json
import re
import tarfile

import pytest
from containers import DOCKERFILE

# limits in bytes, uncompressed; images/README.md lists the largest parts
BUDGETS = {"infer-quantized": 700e6, "infer-cpu": 2.2e9, "infer-cuda": 9e9, "train-cuda": 12e9}
COMPILERS = {"gcc", "cc", "g++", "clang", "make", "nvcc"}
ALLOWED = {"infer-cuda": {"cc", "gcc"}}  # Triton compiles its launchers at run time
UNWANTED = re.compile(
    r"(^|/)\.git(/|$)|^root/\.cache/|^run/secrets/.|^(wheelhouse|wheels|requirements|scripts|src|pip)/.|^var/cache/apt/.*\.deb$"
    r"|^var/lib/apt/lists/.*_Packages|^venv/bin/pip|^(?!usr/)(.*\.whl)$|(^|/)(id_rsa|\.netrc|pip\.conf|\.env)$"
    r"|^(?!venv/lib/)(.*\.(safetensors|gguf))$"  # some packages contain small ones
)
TELEMETRY_OFF = {
    "infer-cpu": {"GRADIO_ANALYTICS_ENABLED=False", "STREAMLIT_BROWSER_GATHER_USAGE_STATS=false"},
    "infer-cuda": {"VLLM_NO_USAGE_STATS=1", "VLLM_DO_NOT_TRACK=1"},
}


def name_of(image):
    return re.fullmatch(r"glm-(.+):.+", image.tags[0])[1]


def file_names(stream):
    """Paths in every layer of a saved image; the layers are those members that are archives themselves."""
    layers = []
    with tarfile.open(fileobj=stream, mode="r|") as saved:
        for member in saved:
            if not member.isfile() or member.size < 1024:
                continue
            try:
                with tarfile.open(fileobj=saved.extractfile(member), mode="r|") as layer:
                    layers.append([entry.name.removeprefix("./") for entry in layer])
            except tarfile.ReadError:  # JSON metadata
                continue
    return layers


class Stream:
    """The chunks that the engine sends, as a readable file."""

    def __init__(self, chunks):
        self.chunks, self.rest = chunks, b""

    def read(self, size):
        parts, have = [self.rest], len(self.rest)
        while have < size and (chunk := next(self.chunks, b"")):
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self.rest = data[size:]
        return data[:size]


@pytest.mark.timeout(900)
def test_no_layer_contains_secrets_caches_git_history_weights_or_compilers(image):
    layers = file_names(Stream(iter(image.save(chunk_size=1 << 22))))
    assert len(layers) >= 4
    names = [name for layer in layers for name in layer]
    assert any(name == "app/entrypoints/__main__.py" for name in names)
    assert [name for name in names if UNWANTED.search(name)] == []
    commands = {name.rpartition("/")[2] for name in names if re.match(r"(usr/)?(local/)?bin/|venv/bin/", name)}
    assert commands & COMPILERS - ALLOWED.get(name_of(image), set()) == set()


def test_the_image_history_contains_no_secret(image):
    assert not re.search(r"(?i)password|BEGIN CERT|token=", " ".join(entry["CreatedBy"] for entry in image.history()))


def test_inspecting_an_image_shows_no_secret_and_nothing_of_the_machine_that_built_it(image):
    """No proxy, CA file or password of the build: its settings, labels and history are readable for everybody."""
    shown = json.dumps([image.attrs, image.history()])
    assert len(shown) > 1000
    assert (
        re.findall(r"(?i)[a-z_]*_proxy=|ca_file|pip_conf|BEGIN [A-Z ]+-|://[^/\s\"]*@|passw(?:or)?d=|secret=", shown)
        == []
    )
    variables = {entry.partition("=")[0] for entry in image.attrs["Config"]["Env"]}
    assert not [name for name in variables if re.search("KEY|TOKEN|PASSWORD|SECRET|CERT|INDEX", name)]


def test_every_file_for_a_build_alone_is_mounted_as_a_secret():
    """A file that is copied stays in a layer, and the value of an ARG stays in the history."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert not re.findall(
        r"^(?:ARG|ENV) .*(?:KEY|TOKEN|PASSWORD|SECRET|CERT|CA_FILE|PIP_CONF|PROXY)", text, re.MULTILINE
    )
    mounted = set(re.findall(r"--mount=type=secret,(\S+)", text))
    assert mounted == {"id=ca", "id=pip"}


def test_the_size_is_within_the_limit(image):
    assert image.attrs["Size"] <= BUDGETS[name_of(image)]


def test_user_entry_point_and_health_check_are_declared(image):
    config = image.attrs["Config"]
    assert config["User"] == "10001:0"  # numeric, as runAsNonRoot requires
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "glm"]
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "/venv/bin/python", "/app/health.py"]
    labels = config["Labels"]
    for label in ("title", "description", "version", "revision", "base.name"):
        assert labels[f"org.opencontainers.image.{label}"]


def test_hub_access_and_telemetry_are_off_and_gpus_are_hidden_by_default(image):
    """Without NVIDIA_VISIBLE_DEVICES=void, the NVIDIA runtime shows all GPUs to pods that request none."""
    expected = {"HF_HUB_OFFLINE=1", "HF_HUB_DISABLE_TELEMETRY=1", "DO_NOT_TRACK=1", "NVIDIA_VISIBLE_DEVICES=void"}
    assert expected | TELEMETRY_OFF.get(name_of(image), set()) <= set(image.attrs["Config"]["Env"])


def test_the_user_has_a_passwd_entry_and_cannot_modify_the_image(image, finish):
    code, text = finish(
        name_of(image),
        "-c",
        "id -un; id -u; touch /app/x /venv/x /usr/x 2>&1",
        entrypoint="/bin/sh",
        network_mode="none",
    )
    assert text.splitlines()[:2] == ["glm", "10001"]
    assert text.count("Permission denied") == 3
    assert code != 0
