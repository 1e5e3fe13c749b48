"""A target folder from elsewhere: its download.json and its links redirect nothing and write nothing outside it."""

import json

import pytest

from entrypoints.errors import UserError
from entrypoints.hub.download import KNOWN_MODELS, download

MODEL = "THUDM/chatglm3-6b"
PINNED = KNOWN_MODELS[MODEL]["huggingface"].revision
WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture
def edit(folder, settings):
    """Change fields of the record of a complete download, and of its entry for WEIGHTS, which has to be fetched."""
    download(MODEL, folder, "huggingface", None, settings)

    def change(fields=(), entry=()):
        record = json.loads((folder / "download.json").read_text())
        for file in record["files"]:
            if file["path"] == WEIGHTS:
                file |= {"sha256": "", **dict(entry)}
        record |= dict(fields)
        (folder / WEIGHTS).unlink()
        (folder / "download.json").write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repo": "evil/weights"}, "repository 'evil/weights', which is not that of 'THUDM/chatglm3-6b'"),
        ({"repo": "../evil"}, "is not a model name"),
        ({"repo": 5}, "download.json is damaged"),
        ({"source": "evil"}, "source 'evil'"),
        ({"commit": "b" * 40}, "which is not revision"),
        ({"commit": "b" * 40, "revision": "main"}, "files from several commits"),
        ({"commit": "../../evil"}, "download.json is damaged"),
        ({"files": []}, "contains no checkpoint"),
        ({"files": {}}, "contains no checkpoint"),
        ({"files": None}, "download.json is damaged"),
    ],
    ids=str,
)
def test_a_record_of_another_repository_or_commit_is_rejected_without_a_request(
    fields, message, edit, folder, settings, huggingface
):
    edit(fields)
    requests = len(huggingface.requests)
    with pytest.raises(UserError, match=message):
        download(MODEL, folder, "auto", None, settings)
    assert len(huggingface.requests) == requests


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "../evil.safetensors"},
        {"path": "/tmp/evil.safetensors"},
        {"path": "model/../../evil.safetensors"},
        {"path": "modeling_chatglm.py"},
        {"path": ""},
        {"path": None},
        {"path": "model\0.safetensors"},
        {"path": "config.json"},
        {"commit": "a" * 40},
        {"commit": "main"},
        {"commit": None},
        {"size": -1},
        {"size": True},
        {"size": 10**18},
        {"size": "5"},
        {"digest": "abc"},
        {"digest": None},
        {"sha256": 5},
    ],
    ids=str,
)
def test_a_record_with_a_file_that_the_hub_could_not_list_is_rejected_without_a_request(
    entry, edit, folder, settings, huggingface
):
    edit(entry=entry)
    requests = len(huggingface.requests)
    with pytest.raises(UserError, match=r"download\.json"):
        download(MODEL, folder, "auto", None, settings)
    assert len(huggingface.requests) == requests
    assert not list(folder.parent.glob("evil*"))


def test_a_link_beside_the_record_is_not_written_through(folder, settings, huggingface):
    outside = folder.parent / "outside"
    folder.mkdir()
    (folder / ".download.json.partial").symlink_to(outside)
    assert not download(MODEL, folder, "auto", None, settings).missing()
    assert not outside.exists()


@pytest.mark.parametrize("name", [WEIGHTS, f"{WEIGHTS}.part"])
def test_nothing_is_written_through_a_link_in_the_target_folder(name, folder, settings, huggingface):
    outside = folder.parent / "outside"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=r"which is a link to .*outside"):
        download(MODEL, folder, "auto", None, settings)
    assert not outside.exists()


def test_an_untouched_record_is_accepted(edit, folder, settings):
    edit()
    assert not download(MODEL, folder, "auto", None, settings).missing()


def test_the_record_of_a_model_that_is_not_known_names_the_requested_repository(folder, settings, huggingface):
    """The hub answers for another repository; the next run would reject a record of that one."""
    huggingface.repo = "somebody/finetuned"
    assert download("somebody/finetuned", folder, "huggingface", None, settings).repo == "somebody/finetuned"
    assert not download("somebody/finetuned", folder, "auto", None, settings).missing()
