"""The capacity page is what its script says, and the script's formula is what two cores have shown."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
from manifests import K8S, container, objects, one, pod_template

CHINESE = {
    "| card |": "| 显卡 |",
    "answers at once": "同时回答数",
    "users of one": "单卡人数",
    " users |": " 人 |",
    "no room": "放不下",
}


@pytest.fixture(scope="module")
def capacity():
    spec = importlib.util.spec_from_file_location("capacity", K8S / "capacity.py")
    sys.modules["capacity"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_pages_show_the_table_of_the_script():
    said = subprocess.run([sys.executable, K8S / "capacity.py"], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 7
    assert said in (K8S / "README.md").read_text(encoding="utf-8")
    for word, chinese in CHINESE.items():
        said = said.replace(word, chinese)
    assert said in (K8S / "README.zh-CN.md").read_text(encoding="utf-8")


def test_the_formula_gives_the_bound_that_two_cores_were_measured_against(capacity):
    """Of k8s/README.md: 3.50 GB read at 29.1 GB/s allow 8.3 tokens a second, and 3.2 were reached."""
    cores = capacity.Card("two cores", 24e9, 29.1e9 / capacity.EFFICIENCY, 1e12)
    bound = 1 / capacity.step_seconds(cores, capacity.Load(), 0, weight_bytes=3.5e9)
    assert bound == pytest.approx(8.3, abs=0.05)
    assert 3.2 / bound == pytest.approx(0.39, abs=0.01)


def test_the_model_has_the_slots_of_the_server(capacity):
    args = container(pod_template(one(objects("production"), "Deployment", "api")), "api")["args"]
    assert int(args[args.index("--slots") + 1]) == capacity.SLOTS


def test_a_token_of_cache_has_28_kib(capacity):
    assert capacity.CACHE_BYTES == 28 << 10


def test_more_users_and_longer_answers_need_no_fewer_cards(capacity):
    usual = capacity.Load()
    for card in capacity.CARDS[1:]:
        needed = [capacity.replicas(card, usual, users) for users in (1, 10, 100, 1000, 10000)]
        assert needed == sorted(needed) and needed[0] == 1
        longer = capacity.replicas(card, replace(usual, answer=1000), 10000)
        assert longer is None or longer > needed[-1]
