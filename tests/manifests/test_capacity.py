"""The capacity page is what its script says, and the script's formula is what two cores have shown."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
from manifests import K8S


@pytest.fixture(scope="module")
def capacity():
    spec = importlib.util.spec_from_file_location("capacity", K8S / "capacity.py")
    sys.modules["capacity"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_pages_show_the_tables_of_the_script():
    said = subprocess.run([sys.executable, K8S / "capacity.py"], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 7
    for readme in ("README.md", "README.zh-CN.md"):
        assert said in (K8S / readme).read_text(encoding="utf-8")


def test_the_formula_gives_the_speed_that_was_measured_on_two_cores(capacity):
    """6.6 tokens a second, 3.51 GB in 4 bits, about 23 GB/s read."""
    cores = capacity.Card("two cores", 24e9, 23e9 / capacity.EFFICIENCY, 1e12)
    assert 1 / capacity.step_seconds(cores, capacity.Load(), 0, weight_bytes=3.51e9) == pytest.approx(6.6, rel=0.02)


def test_a_token_of_cache_has_28_kib(capacity):
    assert capacity.CACHE_BYTES == 28 << 10


def test_more_users_and_longer_answers_need_no_fewer_cards(capacity):
    usual = capacity.Load()
    for card in capacity.CARDS[1:]:
        needed = [capacity.replicas(card, usual, users) for users in (1, 10, 100, 1000, 10000)]
        assert needed == sorted(needed) and needed[0] == 1
        longer = capacity.replicas(card, replace(usual, answer=1000), 10000)
        assert longer is None or longer > needed[-1]
