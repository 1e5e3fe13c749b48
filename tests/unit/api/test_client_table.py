"""The table of clients in the serving guide agrees with the lock files of their environment and with the scripts."""

import json
import re

import client_table
from client_table import FOLDER, NODE, script, table

LOCK = FOLDER.parents[1] / "images" / "requirements" / "clients.lock"


def test_the_table_has_the_version_of_each_client_from_its_lock_file():
    python = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK.read_text(), re.M))
    packages = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    node = {name.removeprefix("node_modules/"): entry["version"] for name, entry in packages.items() if name}
    expected = {
        client: node[client.removeprefix(NODE)] if client.startswith(NODE) else python[client] for client in table()
    }
    assert {client: version for client, (version, _) in table().items()} == expected


def test_both_languages_have_the_same_table_and_every_script_is_in_it():
    assert table() == table("README.zh-CN.md")
    assert sorted(map(script, table())) == sorted(path.name for path in FOLDER.glob("with_*"))
    assert len(table()) == 15
    assert client_table.API.is_dir()


def test_the_environment_of_the_clients_has_no_torch():
    assert not re.search(r"^(torch|nvidia-.*|triton)==", LOCK.read_text(), re.M)
