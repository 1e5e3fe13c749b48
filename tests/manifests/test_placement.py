"""Each pod lands on its kind of node, none waits while one fits, none takes a GPU node without asking for a GPU."""

import pytest
from admission import finds
from manifest_uses import USES
from manifests import OVERLAYS, container, containers, objects, one, pod_template, pods
from scheduling import Node, gpu_machine, machine, may_run, place, requests

A100 = ("NVIDIA-A100-SXM4-80GB", 81920)
CARDS = {
    "gpu/a100-80g": [A100, ("NVIDIA-A100-80GB-PCIe", 81920)],
    "gpu/h100": [("NVIDIA-H100-80GB-HBM3", 81559), ("NVIDIA-H100-PCIe", 81559)],
    "gpu/l20": [("NVIDIA-L20", 46068)],
    "gpu/rtx-4090": [("NVIDIA-GeForce-RTX-4090", 24564), ("NVIDIA-GeForce-RTX-4090-D", 24564)],
    "gpu/t4": [("Tesla-T4", 15360)],
}
SLICED = "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb"
OTHERS = [("NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", 9728), ("NVIDIA-A100-SXM4-80GB-SHARED", 81920)]


def cluster(tainted: bool) -> list[Node]:
    """Machines of every kind, the GPU ones with the usual taint or without."""
    return [
        machine("small", 2, 4),
        machine("large", 16, 64),
        gpu_machine("t4", "Tesla-T4", 15360, 1, 8, 32, tainted=tainted),
        gpu_machine("rtx", "NVIDIA-GeForce-RTX-4090", 24564, 2, 32, 128, tainted=tainted),
        gpu_machine(
            "shared", "NVIDIA-A100-SXM4-80GB-SHARED", 81920, 80, 96, 512, tainted=tainted, sharing="time-slicing"
        ),
        gpu_machine("sliced", SLICED, 40192, 16, 96, 1024, tainted=tainted, slices=3),
        gpu_machine("eight-a", *A100, 8, 96, 512, tainted=tainted),
        gpu_machine("eight-b", *A100, 8, 96, 512, tainted=tainted),
    ]


def instances(overlay: str) -> list[tuple[str, dict]]:
    """A pod for each replica or completion."""
    things = objects(overlay)
    lowest = {
        thing["spec"]["scaleTargetRef"]["name"]: thing["spec"]["minReplicas"]
        for thing in things
        if thing["kind"] == "HorizontalPodAutoscaler"
    }
    found = []
    for thing in things:
        template = pod_template(thing)
        if template:
            count = (
                thing["spec"].get("completions")
                or thing["spec"].get("replicas")
                or lowest.get(thing["metadata"]["name"], 1)
            )
            found += [(thing["metadata"]["name"], template)] * count
    return found


def asks_for_a_gpu(template: dict) -> bool:
    return "nvidia.com/gpu" in requests(template)


@pytest.mark.parametrize("tainted", [True, False], ids=["tainted", "untainted"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_pod_lands_on_its_kind_of_node_and_none_waits(overlay, tainted):
    nodes = cluster(tainted)
    placed = {}
    for name, template in instances(overlay):
        node = place(template, nodes)
        assert node is not None, f"{name} waits"
        assert node.has_gpu == asks_for_a_gpu(template), f"{name} is on {node.name}"
        assert node.name not in ("t4", "shared") and (name, node.name) != ("train", "sliced"), name
        placed.setdefault(name, []).append(node.name)
    assert len(placed) >= 2
    if overlay == "train-multi":
        assert sorted(placed["train"]) == ["eight-a", "eight-b"]


def test_the_demo_fits_one_small_node():
    nodes = [machine("small", 2, 4)]
    assert [place(template, nodes) is not None for _, template in instances("demo")] == [True] * 3


def test_two_replicas_fit_one_machine_that_has_the_cards():
    """Their spread is a wish."""
    nodes = [gpu_machine("eight", *A100, 8, 96, 512)]
    served = [template for name, template in instances("production") if name == "api"]
    assert [place(template, nodes) is not None for template in served] == [True, True]


def test_a_server_fits_the_smallest_machine_that_has_its_card(used):
    """4 cores and 16 GiB beside a card of 24 GB; the same beside a T4, on which 16-bit weights leave no room."""
    small = gpu_machine("a10", "NVIDIA-A10G", 23028, 1, 4, 16)
    t4 = gpu_machine("t4", "Tesla-T4", 15360, 1, 4, 16)
    (server,) = (template for name, template in instances("serve-gpu") if name == "api")
    assert place(server, [t4]) is None
    assert place(server, [t4, small]) is small
    (server,) = (template for name, template in pods(used("gpu/t4")) if name == "Deployment/api")
    assert place(server, [small]) is None
    assert place(server, [small, t4]) is t4
    args = container(server, "api")["args"]
    assert args[args.index("--engine") :][:4] == ["--engine", "transformers", "--load-in", "4bit"]


def test_training_takes_whole_cards_and_serving_a_slice_that_is_large_enough():
    """Where no card is sliced, GPU Feature Discovery writes the same strategy and no slices."""
    sliced = gpu_machine("sliced", SLICED, 40192, 16, 96, 1024, slices=3)
    whole = gpu_machine("whole", *A100, 8, 96, 1024, slices=0)
    assert sliced.labels["nvidia.com/mig.strategy"] == whole.labels["nvidia.com/mig.strategy"] == "single"
    for overlay in ("train-single", "train-multi"):
        run = next(template for name, template in instances(overlay) if name == "train")
        assert (may_run(run, sliced), may_run(run, whole)) == (False, True)
    server = next(template for name, template in instances("serve-gpu") if name == "api")
    assert (may_run(server, sliced), may_run(server, whole)) == (True, True)


def test_pods_on_a_disk_of_one_node_would_rather_be_together():
    wishes = [
        template["spec"]["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        for _, template in instances("demo")
    ]
    assert len(wishes) == 3
    for (wish,), (_, template) in zip(wishes, instances("demo"), strict=True):
        assert wish["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        assert finds(wish["podAffinityTerm"]["labelSelector"], template)


@pytest.mark.parametrize("name", CARDS)
def test_a_product_component_takes_its_card_in_each_form_and_no_other(name, used):
    templates = [template for _, template in pods(used(name)) if asks_for_a_gpu(template)]
    assert templates
    every = [card for cards in CARDS.values() for card in cards] + OTHERS
    for template in templates:
        taken = [card for card in every if may_run(template, gpu_machine("n", *card, 8, 96, 512))]
        assert taken == CARDS[name]


def test_pods_for_processors_run_on_gpu_nodes_only_where_that_is_chosen(used):
    nodes = [gpu_machine("only", *A100, 8, 96, 512)]
    templates = [template for _, template in pods(used("gpu-nodes-only"))]
    assert len(templates) == 3
    assert all(place(template, nodes) for template in templates)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpu_pods_are_guaranteed_and_ask_for_as_much_as_they_may_use(overlay):
    """K1: requests equal limits, so nothing else takes what they count on."""
    for name, template in pods(objects(overlay)):
        for each in containers(template):
            wants, may = each["resources"]["requests"], each["resources"]["limits"]
            assert {*wants} == {*may} >= {"cpu", "memory", "ephemeral-storage"}, (name, each["name"])
            same = [key for key in wants if key != "cpu"] + (["cpu"] if "nvidia.com/gpu" in wants else [])
            assert all(wants[key] == may[key] for key in same), (name, each["name"])


def test_pods_without_a_gpu_see_none(used):
    """K1: the NVIDIA runtime shows all GPUs to a container that says nothing."""
    things = [thing for overlay in OVERLAYS for thing in objects(overlay)] + [
        each for name in USES for each in used(name)
    ]
    blind = 0
    for name, template in pods(things):
        for each in containers(template):
            sees = {entry["name"]: entry.get("value") for entry in each["env"]}.get("NVIDIA_VISIBLE_DEVICES")
            assert (sees == "void") == ("nvidia.com/gpu" not in each["resources"]["requests"]), (
                name,
                each["name"],
            )
            blind += sees == "void"
    assert blind >= 60


def test_runtime_class_is_set_for_gpu_pods_alone(used):
    classes = {name: template["spec"].get("runtimeClassName") for name, template in pods(used("runtime-class"))}
    assert classes == {
        "Deployment/api": "nvidia",
        "Job/train": "nvidia",
        "CronJob/evaluate": "nvidia",
        "Job/model-init": None,
    }
    assert one(used("runtime-class"), "Job", "train")
