"""The capacity tables of the READMEs equal the output of k8s/capacity.py, and its formula agrees with a measurement."""

import subprocess
import sys
from dataclasses import replace

import pytest
from manifests import K8S, container, objects, one, pod_template

from entrypoints.doctor import capacity
from entrypoints.doctor.capacity import Load, Served
from entrypoints.hardware.cards import Card, parse_card
from entrypoints.hub.model_dimensions import PUBLISHED

CHINESE = {
    "| GPU |": "| 显卡 |",
    "running requests": "并发请求数",
    "users per GPU": "单卡用户数",
    " users |": " 人 |",
    "too small": "显存不足",
}


MODEL = Served.in_16_bits(PUBLISHED["THUDM/chatglm3-6b"])
LARGE_ENOUGH = ("RTX 4090", "L20", "A100 80G", "H100")


def test_both_readmes_contain_the_table_of_the_script():
    table = subprocess.run([sys.executable, K8S / "capacity.py"], capture_output=True, text=True, check=True).stdout
    assert table.count("\n") == 7
    assert table in (K8S / "README.md").read_text(encoding="utf-8")
    for word, chinese in CHINESE.items():
        table = table.replace(word, chinese)
    assert table in (K8S / "README.zh-CN.md").read_text(encoding="utf-8")


def test_the_formula_gives_the_upper_bound_of_the_measurement_on_two_cpu_cores():
    """k8s/README.md: 3.50 GB at 29.4 GB/s allow 8.4 tokens/s, and 2.8 were measured."""
    cores = Card("two cores", 24e9, 29.4e9 / capacity.EFFICIENCY, 1e12)
    bound = 1 / capacity.step_seconds(cores, replace(MODEL, weights=3.5e9), Load(), 0)
    assert bound == pytest.approx(8.4, abs=0.05)
    assert 2.8 / bound == pytest.approx(0.33, abs=0.01)


def test_the_model_uses_the_number_of_slots_of_the_server():
    args = container(pod_template(one(objects("production"), "Deployment", "api")), "api")["args"]
    assert int(args[args.index("--slots") + 1]) == capacity.SLOTS


def test_the_model_of_the_6b_has_28_kib_of_kv_cache_per_token():
    assert Served(weights=2 * 6_243_584_000, cache_per_token=28 << 10, parameters=6_243_584_000) == MODEL


def test_more_users_or_longer_answers_never_need_fewer_gpus():
    default = Load()
    for card in map(parse_card, LARGE_ENOUGH):
        needed = [capacity.replicas(card, MODEL, default, users) for users in (1, 10, 100, 1000, 10000)]
        assert needed == sorted(needed)
        assert needed[0] == 1
        longer = capacity.replicas(card, MODEL, replace(default, answer=1000), 10000)
        assert longer is None or longer > needed[-1]
