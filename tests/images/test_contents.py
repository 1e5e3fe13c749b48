"""What is in the images: user, environment, size, and nothing that does not belong there. Traps J5, K1."""

import re
import tarfile

import pytest

# bytes, uncompressed; images/NAME/README.md tells what they are made of
BUDGETS = {"infer-quantized": 700e6, "infer-cpu": 2.2e9, "infer-cuda": 9e9, "train-cuda": 12e9}
COMPILERS = {"gcc", "cc", "g++", "clang", "make", "nvcc"}
ALLOWED = {"infer-cuda": {"cc", "gcc"}}  # Triton compiles its launchers at run time
UNWANTED = re.compile(
    r"(^|/)\.git(/|$)|^root/\.cache/|^run/secrets/.|^(wheelhouse|wheels|requirements|scripts|src|pip)/.|^var/cache/apt/.*\.deb$"
    r"|^var/lib/apt/lists/.*_Packages|^venv/bin/pip|^(?!usr/)(.*\.whl)$|(^|/)(id_rsa|\.netrc|pip\.conf|\.env)$"
    r"|^(?!venv/lib/)(.*\.(safetensors|gguf))$"  # some packages bring small ones
)
TELEMETRY_OFF = {
    "infer-cpu": {"GRADIO_ANALYTICS_ENABLED=False", "STREAMLIT_BROWSER_GATHER_USAGE_STATS=false"},
    "infer-cuda": {"VLLM_NO_USAGE_STATS=1", "VLLM_DO_NOT_TRACK=1"},
}


def name_of(image):
    return re.fullmatch(r"glm-(.+):.+", image.tags[0])[1]


def file_names(stream):
    """Paths in every layer of an image that was saved: layers are the members that are archives themselves."""
    layers = []
    with tarfile.open(fileobj=stream, mode="r|") as saved:
        for member in saved:
            if not member.isfile() or member.size < 1024:
                continue
            try:
                with tarfile.open(fileobj=saved.extractfile(member), mode="r|") as layer:
                    layers.append([entry.name.removeprefix("./") for entry in layer])
            except tarfile.ReadError:  # a description in JSON
                continue
    return layers


class Stream:
    """What the engine sends in pieces, read as a file."""

    def __init__(self, pieces):
        self.pieces, self.rest = pieces, b""

    def read(self, size):
        parts, have = [self.rest], len(self.rest)
        while have < size and (piece := next(self.pieces, b"")):
            parts.append(piece)
            have += len(piece)
        data = b"".join(parts)
        self.rest = data[size:]
        return data[:size]


@pytest.mark.timeout(900)
def test_no_layer_holds_secrets_caches_history_weights_or_compilers(image):
    layers = file_names(Stream(iter(image.save(chunk_size=1 << 22))))
    assert len(layers) >= 4
    names = [name for layer in layers for name in layer]
    assert any(name == "app/entrypoints/__main__.py" for name in names)
    assert [name for name in names if UNWANTED.search(name)] == []
    commands = {name.rpartition("/")[2] for name in names if re.match(r"(usr/)?(local/)?bin/|venv/bin/", name)}
    assert commands & COMPILERS - ALLOWED.get(name_of(image), set()) == set()


def test_the_history_names_no_secret(image):
    assert not re.search(r"(?i)password|BEGIN CERT|token=", " ".join(entry["CreatedBy"] for entry in image.history()))


def test_the_size_is_within_its_budget(image):
    assert image.attrs["Size"] <= BUDGETS[name_of(image)]


def test_user_entry_point_and_health_check_are_declared(image):
    config = image.attrs["Config"]
    assert config["User"] == "10001:0"  # a number, so that runAsNonRoot can check it
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "glm"]
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "/venv/bin/python", "/app/health.py"]
    labels = config["Labels"]
    for label in ("title", "description", "version", "revision", "base.name"):
        assert labels[f"org.opencontainers.image.{label}"]


def test_hubs_and_telemetry_are_off_and_gpus_come_only_when_asked_for(image):
    """K1: without this variable a pod that asks for no GPU sees all of them."""
    expected = {"HF_HUB_OFFLINE=1", "HF_HUB_DISABLE_TELEMETRY=1", "DO_NOT_TRACK=1", "NVIDIA_VISIBLE_DEVICES=void"}
    assert expected | TELEMETRY_OFF.get(name_of(image), set()) <= set(image.attrs["Config"]["Env"])


def test_the_user_has_a_passwd_entry_and_may_not_change_the_image(image, finish):
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
