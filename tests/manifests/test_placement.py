"""Each pod is scheduled on the right kind of node; pods that request no GPU stay off GPU nodes."""

import pytest
from admission import selects
from manifests import OVERLAYS, amount, container, containers, objects, pod_template, pods
from scheduling import Gpus, Node, cpu_node, fits, gpu_node, requests, schedule

A100 = Gpus("NVIDIA-A100-SXM4-80GB", 81920, 8)
A10 = Gpus("NVIDIA-A10G", 23028)
T4 = Gpus("Tesla-T4", 15360)
CARDS = {
    "gpu/a100-80g": [("NVIDIA-A100-SXM4-80GB", 81920), ("NVIDIA-A100-80GB-PCIe", 81920)],
    "gpu/h100": [("NVIDIA-H100-80GB-HBM3", 81559), ("NVIDIA-H100-PCIe", 81559)],
    "gpu/l20": [("NVIDIA-L20", 46068)],
    "gpu/rtx-4090": [("NVIDIA-GeForce-RTX-4090", 24564), ("NVIDIA-GeForce-RTX-4090-D", 24564)],
    "gpu/t4": [("Tesla-T4", 15360)],
}
MIG = Gpus("NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", 40192, 16, mig_slices=3)
OTHERS = [("NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", 9728), ("NVIDIA-A100-SXM4-80GB-SHARED", 81920)]


def cluster(tainted: bool) -> list[Node]:
    """Nodes of every kind; GPU nodes have the usual taint, or none."""
    rtx = Gpus("NVIDIA-GeForce-RTX-4090", 24564, 2)
    shared = Gpus("NVIDIA-A100-SXM4-80GB-SHARED", 81920, 80, sharing="time-slicing")
    return [
        cpu_node("small", 2, 4),
        cpu_node("large", 16, 64),
        gpu_node("t4", T4, 8, 32, tainted=tainted),
        gpu_node("rtx", rtx, 32, 128, tainted=tainted),
        gpu_node("shared", shared, 96, 512, tainted=tainted),
        gpu_node("sliced", MIG, 96, 1024, tainted=tainted),
        gpu_node("eight-a", A100, 96, 512, tainted=tainted),
        gpu_node("eight-b", A100, 96, 512, tainted=tainted),
    ]


def instances(overlay: str) -> list[tuple[str, dict]]:
    """Name and template of each pod, one for each replica or completion."""
    manifests = objects(overlay)
    lowest = {
        manifest["spec"]["scaleTargetRef"]["name"]: manifest["spec"]["minReplicas"]
        for manifest in manifests
        if manifest["kind"] == "HorizontalPodAutoscaler"
    }
    found = []
    for manifest in manifests:
        template = pod_template(manifest)
        if template:
            count = (
                manifest["spec"].get("jobTemplate", {}).get("spec", {}).get("completions")
                or manifest["spec"].get("replicas")
                or lowest.get(manifest["metadata"]["name"], 1)
            )
            found += [(manifest["metadata"]["name"], template)] * count
    return found


def requests_gpu(template: dict) -> bool:
    return "nvidia.com/gpu" in requests(template)


@pytest.mark.parametrize("tainted", [True, False], ids=["tainted", "untainted"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_pod_is_scheduled_on_its_kind_of_node(overlay, tainted):
    nodes = cluster(tainted)
    placed = {}
    for name, template in instances(overlay):
        node = schedule(template, nodes)
        assert node is not None, f"{name} is pending"
        assert node.has_gpu == requests_gpu(template), f"{name} is on {node.name}"
        assert node.name not in ("t4", "shared"), name
        assert (name, node.name) != ("train", "sliced")
        placed.setdefault(name, []).append(node.name)
    assert len(placed) >= 2
    if overlay == "train-multi":
        assert sorted(placed["train"]) == ["eight-a", "eight-b"]


def test_the_demo_fits_one_small_node():
    nodes = [cpu_node("small", 2, 4)]
    assert [schedule(template, nodes) is not None for _, template in instances("demo")] == [True] * 3


def test_two_replicas_fit_one_node_with_enough_gpus():
    """Spreading over nodes is preferred, not required."""
    nodes = [gpu_node("eight", A100, 96, 512)]
    served = [template for name, template in instances("production") if name == "api"]
    assert [schedule(template, nodes) is not None for template in served] == [True, True]


def test_a_server_fits_the_smallest_node_with_its_gpu(used):
    """4 cores and 16 GiB with a GPU of 24 GB, or with a T4, which is too small for 16-bit weights and a KV cache."""
    small = gpu_node("a10", A10, 4, 16)
    t4 = gpu_node("t4", T4, 4, 16)
    (server,) = (template for name, template in instances("serve-gpu") if name == "api")
    assert schedule(server, [t4]) is None
    assert schedule(server, [t4, small]) is small
    (server,) = (template for name, template in pods(used("gpu/t4")) if name == "Deployment/api")
    assert schedule(server, [small]) is None
    assert schedule(server, [small, t4]) is t4
    args = container(server, "api")["args"]
    assert args[args.index("--engine") :][:4] == ["--engine", "transformers", "--load-in", "4bit"]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_server_with_several_gpus_has_slots_memory_and_a_core_for_each(count, used):
    (server,) = (template for name, template in pods(used(f"gpus/{count}")) if name == "Deployment/api")
    (one_gpu,) = (template for name, template in instances("serve-gpu") if name == "api")
    each, single = container(server, "api"), container(one_gpu, "api")
    for flag in ("--slots", "--queue"):
        of_each, of_one = (int(one["args"][one["args"].index(flag) + 1]) for one in (each, single))
        assert of_each == count * of_one
    requested, before = each["resources"]["requests"], single["resources"]["requests"]
    assert requested == each["resources"]["limits"]
    assert requested["nvidia.com/gpu"] == str(count)
    assert int(requested["cpu"]) - int(before["cpu"]) == count - 1
    assert amount(requested["memory"]) - amount(before["memory"]) == (count - 1) * (
        5 << 30
    )  # as compose/README.md says


def test_training_needs_whole_gpus_and_serving_accepts_a_large_enough_mig_slice():
    """GPU Feature Discovery sets the same MIG strategy with and without slices, but the slice label only with them."""
    sliced = gpu_node("sliced", MIG, 96, 1024)
    whole = gpu_node("whole", A100, 96, 1024)
    assert sliced.labels["nvidia.com/mig.strategy"] == whole.labels["nvidia.com/mig.strategy"] == "single"
    for overlay in ("train-single", "train-multi"):
        run = next(template for name, template in instances(overlay) if name == "train")
        assert (fits(run, sliced), fits(run, whole)) == (False, True)
    server = next(template for name, template in instances("serve-gpu") if name == "api")
    assert (fits(server, sliced), fits(server, whole)) == (True, True)


def test_pods_that_share_a_single_node_disk_prefer_the_same_node():
    preferences = [
        template["spec"]["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        for _, template in instances("demo")
    ]
    assert len(preferences) == 3
    for (preference,), (_, template) in zip(preferences, instances("demo"), strict=True):
        assert preference["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        assert selects(preference["podAffinityTerm"]["labelSelector"], template)


@pytest.mark.parametrize("name", CARDS)
def test_a_product_component_selects_its_gpu_in_each_form_and_no_other(name, used):
    templates = [template for _, template in pods(used(name)) if requests_gpu(template)]
    assert templates
    every = [card for cards in CARDS.values() for card in cards] + OTHERS
    for template in templates:
        selected = [card for card in every if fits(template, gpu_node("n", Gpus(*card, 8), 96, 512))]
        assert selected == CARDS[name]


def test_cpu_pods_run_on_gpu_nodes_with_gpu_nodes_only(used):
    nodes = [gpu_node("only", A100, 96, 512)]
    templates = [template for _, template in pods(used("gpu-nodes-only"))]
    assert len(templates) == 3
    assert all(schedule(template, nodes) for template in templates)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_requests_equal_limits_except_for_cpu_without_a_gpu_and_for_the_idle_model_init(overlay):
    """Then no other pod can take the memory or the cores of a GPU pod."""
    for name, template in pods(objects(overlay)):
        for each in containers(template):
            requested, limits = each["resources"]["requests"], each["resources"]["limits"]
            if each["name"] == "model-init":  # its requests stay reserved while the pod idles
                assert amount(requested["memory"]) <= 1 << 30
                continue
            assert {*requested} == {*limits} >= {"cpu", "memory", "ephemeral-storage"}, (name, each["name"])
            same = [key for key in requested if key != "cpu"] + (["cpu"] if "nvidia.com/gpu" in requested else [])
            assert all(requested[key] == limits[key] for key in same), (name, each["name"])


def test_pods_without_a_gpu_see_none(templates):
    """The NVIDIA runtime shows all GPUs to a container without NVIDIA_VISIBLE_DEVICES."""
    hidden = 0
    for name, template in templates:
        for each in containers(template):
            visible = {entry["name"]: entry.get("value") for entry in each["env"]}.get("NVIDIA_VISIBLE_DEVICES")
            with_gpu = "nvidia.com/gpu" in each["resources"]["requests"] or "claims" in each["resources"]
            assert (visible == "void") != with_gpu, (name, each["name"])
            hidden += visible == "void"
    assert hidden >= 60


def test_the_runtime_class_is_set_only_for_gpu_pods(used):
    classes = {name: template["spec"].get("runtimeClassName") for name, template in pods(used("runtime-class"))}
    assert classes == {
        "Deployment/api": "nvidia",
        "CronJob/train": "nvidia",
        "CronJob/evaluate": "nvidia",
        "Deployment/model-init": None,
    }
