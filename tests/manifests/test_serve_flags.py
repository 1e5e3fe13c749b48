"""Flags of `glm serve` that a component or a patch adds, and the volumes and memory that they need."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from manifests import K8S, amount, arguments, container, kustomize, one, parse, pod_template

from entrypoints.__main__ import parse_arguments
from entrypoints.engines.llamacpp.engine import needed_bytes
from entrypoints.hub.model_dimensions import read_dimensions
from entrypoints.quantization.tensor_types import plan_tensor_types


def api(manifests: list[dict]) -> tuple[dict, dict, object]:
    """Pod specification, container and parsed arguments of the API."""
    template = pod_template(one(manifests, "Deployment", "api"))
    server = container(template, "api")
    return template["spec"], server, parse_arguments(arguments(server))[1]


def test_computed_prompts_have_a_read_only_file_and_a_disk_that_is_larger_than_their_limit(used):
    spec, server, args = api(used("prefix-cache"))
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    warm, prefixes = mounts[f"{args.warm.parent}"], mounts[f"{args.prefix_cache}"]
    assert warm["readOnly"]
    assert volumes[warm["name"]]["configMap"] == {"name": "warm"}
    assert not prefixes.get("readOnly")
    assert args.prefix_cache_gb * 10**9 < amount(volumes[prefixes["name"]]["emptyDir"]["sizeLimit"])


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_documented_config_map_is_the_one_that_is_mounted(readme, used):
    command = re.search(r"create configmap (\S+) --from-file=(\S+)", (K8S / readme).read_text(encoding="utf-8"))
    _, _, args = api(used("prefix-cache"))
    assert (command[1], command[2]) == ("warm", args.warm.name)


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_patch_of_the_readme_serves_glm_4_9b_within_its_memory(readme, tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (K8S / readme).read_text(encoding="utf-8"), re.DOTALL)
    (overlay,) = (block for block in blocks if "patches:" in block)
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(overlay)
    done = kustomize(mine)
    assert done.returncode == 0, done.stderr
    _, server, args = api(parse(done.stdout))
    assert (args.context_length, args.slots) == (8192, 4)
    dimensions = read_dimensions(Path("THUDM/glm-4-9b-chat"))
    weights = sum(plan.size for plan in plan_tensor_types(dimensions, "q4_0"))
    limit = amount(server["resources"]["limits"]["memory"])
    assert 0.9 * limit < needed_bytes(dimensions, weights, args.slots, args.context_length) < 0.95 * limit
    assert needed_bytes(dimensions, weights, args.slots, dimensions.context_length) == pytest.approx(32 << 30, rel=0.02)
    before = yaml.safe_load((K8S / "base" / "serve" / "deployment.yaml").read_text())
    assert limit > amount(container(pod_template(before), "api")["resources"]["limits"]["memory"])
