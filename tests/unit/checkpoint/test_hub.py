"""What `glm download` fetches, from where, and what it leaves in the folder."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from entrypoints.checkpoint.hub import KNOWN, canonical, download
from entrypoints.errors import UserError

MODEL = "THUDM/chatglm3-6b"
PINNED = KNOWN[MODEL]["huggingface"].revision
WEIGHTS = "model-00001-of-00002.safetensors"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {"download.json", ".download.lock"}


def record(folder: Path) -> dict:
    return json.loads((folder / "download.json").read_text())


def glm(*words: str, cwd: Path, settings, **env: str) -> subprocess.Popen:
    """`glm download` as a user starts it, with nothing of this environment but the path."""
    env = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": settings.hf_endpoint,
        "MODELSCOPE_ENDPOINT": settings.modelscope_endpoint,
        "HF_TOKEN": settings.hf_token.value,
        "HOME": str(cwd / "home"),
        **env,
    }
    command = [sys.executable, "-W", "error", "-m", "entrypoints", "download", *words]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("source", "commit"), [("huggingface", PINNED), ("modelscope", "c0ffee" + "0" * 34)])
def test_every_wanted_file_arrives_with_a_record_of_source_commit_size_and_hash(
    folder, settings, hub_files, wanted, source, commit
):
    download(MODEL, folder, source, None, settings)
    assert names(folder) == wanted
    written = record(folder)
    assert (written["source"], written["commit"]) == (source, commit)
    assert {file["path"] for file in written["files"]} == wanted
    for file in written["files"]:
        body = (folder / file["path"]).read_bytes()
        assert body == hub_files[file["path"]]
        assert (file["size"], file["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def test_bin_weights_are_fetched_where_there_are_no_safetensors(folder, settings, huggingface):
    for files in huggingface.revisions.values():
        for name in [name for name in files if ".safetensors" in name]:
            del files[name]
    download(MODEL, folder, "huggingface", None, settings)
    assert {name for name in names(folder) if "model" in name and not name.startswith("token")} == {
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    }


def test_the_four_models_are_known_under_each_name_of_their_organisation():
    assert len(KNOWN) == 4
    for model, places in KNOWN.items():
        assert canonical(model.replace("THUDM", "zai-org")) == canonical(places["modelscope"].repo) == model
    assert canonical("ZhipuAI/glm-4-9b") == "ZhipuAI/glm-4-9b"


def test_the_pinned_commit_is_asked_for_and_every_file_is_fetched_at_it(folder, settings, huggingface):
    download("zai-org/chatglm3-6b", folder, "auto", None, settings)
    assert huggingface.asked[0].path == f"/api/models/{MODEL}/revision/{PINNED}"
    assert len(huggingface.file_requests()) == 9
    assert all(f"/resolve/{PINNED}/" in asked.path for asked in huggingface.file_requests())


def test_a_branch_is_resolved_to_a_commit_once(folder, settings, modelscope, commit):
    download(MODEL, folder, "modelscope", None, settings)
    assert [asked.query["Revision"] for asked in modelscope.asked] == ["master"] + [commit] * 9


def test_a_later_run_goes_on_at_the_recorded_commit_though_the_branch_moved(
    folder, settings, huggingface, commit, later
):
    huggingface.answers[f"/{WEIGHTS}"] = [403]
    with pytest.raises(UserError):
        download(MODEL, folder, "huggingface", "main", settings)
    huggingface.revisions[later] = {name: body + b"!" for name, body in huggingface.revisions[commit].items()}
    huggingface.branches["main"] = later
    download(MODEL, folder, "auto", None, settings)
    assert record(folder)["commit"] == commit
    assert all(f"/resolve/{commit}/" in asked.path for asked in huggingface.file_requests())


def test_a_second_run_contacts_nobody(folder, settings, huggingface):
    download(MODEL, folder, "auto", None, settings)
    dead = replace(settings, hf_endpoint="http://127.0.0.1:1", modelscope_endpoint="http://127.0.0.1:1")
    asked = len(huggingface.asked)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "download.json"}
    download(MODEL, folder, "auto", None, dead)
    download("ZhipuAI/chatglm3-6b", folder, "huggingface", PINNED[:7], dead)
    assert len(huggingface.asked) == asked
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize(
    ("model", "source", "revision"),
    [
        (MODEL, "auto", "main"),
        (MODEL, "modelscope", None),
        ("THUDM/chatglm3-6b-base", "auto", None),
        (MODEL, "auto", "e9"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(folder, settings, model, source, revision):
    download(MODEL, folder, "huggingface", None, settings)
    with pytest.raises(UserError, match=rf"holds zai-org/chatglm3-6b of huggingface .*{PINNED}, not .*--output-dir"):
        download(model, folder, source, revision, settings)


def test_a_file_that_was_removed_or_cut_since_is_fetched_again_alone(folder, settings, huggingface, storage, hub_files):
    download(MODEL, folder, "huggingface", None, settings)
    (folder / "config.json").unlink()
    (folder / WEIGHTS).write_bytes(b"short")
    huggingface.asked.clear()
    download(MODEL, folder, "huggingface", None, settings)
    assert [asked.path.rpartition("/")[2] for asked in huggingface.asked] == ["config.json", WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_a_git_clone_is_completed_and_its_lfs_pointers_are_replaced(folder, settings, huggingface, storage, hub_files):
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes(hub_files[name])
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10240\n")
    download(MODEL, folder, "huggingface", None, settings)
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]
    assert not huggingface.got("config.json") and not storage.got("tokenizer.model")


def test_files_of_another_origin_are_never_overwritten(folder, settings, huggingface):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "xhatglm"}')  # as long as the hub's
    with pytest.raises(UserError, match=r"holds other contents under config\.json; choose an empty --output-dir"):
        download(MODEL, folder, "huggingface", None, settings)
    assert (folder / "config.json").read_text() == '{"model_type": "xhatglm"}'
    assert not huggingface.file_requests()


def test_auto_turns_to_modelscope_when_hugging_face_cannot_be_reached(folder, settings, caplog):
    download(MODEL, folder, "auto", None, replace(settings, hf_endpoint="http://127.0.0.1:1"))
    assert record(folder)["source"] == "modelscope"
    assert "cannot be reached ([Errno 111] Connection refused)" in caplog.text


def test_auto_turns_to_modelscope_when_hugging_face_lacks_the_model(folder, settings, huggingface, caplog):
    huggingface.repo = "zai-org/another"
    download(MODEL, folder, "auto", None, settings)
    assert record(folder)["repo"] == "ZhipuAI/chatglm3-6b"
    assert "THUDM/chatglm3-6b on 127.0.0.1 does not exist" in caplog.text


def test_a_source_that_is_named_is_the_only_one_asked(folder, settings, modelscope):
    with pytest.raises(UserError, match="cannot be reached"):
        download(MODEL, folder, "huggingface", None, replace(settings, hf_endpoint="http://127.0.0.1:1"))
    assert not modelscope.asked


def test_a_mirror_is_the_only_host_asked(folder, settings, huggingface, storage, monkeypatch):
    asked = set()
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda to, *rest, **more: asked.add(to) or connect(to, *rest, **more)
    )
    download(MODEL, folder, "auto", None, replace(settings, hf_endpoint=f"{huggingface.url}/"))
    assert asked == {("127.0.0.1", huggingface.port), ("127.0.0.1", storage.port)}


def test_the_token_goes_to_the_hub_alone(folder, tmp_path, settings, huggingface, storage, modelscope):
    download(MODEL, folder, "huggingface", None, settings)
    download(MODEL, tmp_path / "other", "modelscope", None, settings)
    assert all(asked.headers["authorization"] == "Bearer hf_opensesame" for asked in huggingface.asked)
    assert len(storage.asked) == 3  # two shards and tokenizer.model
    assert not any("hf_opensesame" in str(asked) for asked in storage.asked + modelscope.asked)


def test_any_other_model_is_taken_as_it_is_named(folder, settings, huggingface):
    huggingface.repo = "me/my-glm"
    download("me/my-glm", folder, "auto", None, settings)
    assert huggingface.asked[0].path == "/api/models/me/my-glm/revision/main"


@pytest.mark.parametrize("name", ["chatglm3-6b", "a/b/c", "../etc", "a/b c", "a/../b", "", "https://hf.co/a/b"])
def test_a_name_that_is_not_org_slash_name_is_refused(folder, settings, huggingface, name):
    with pytest.raises(UserError, match="give ORG/NAME, for example THUDM/chatglm3-6b"):
        download(name, folder, "auto", None, settings)
    assert not huggingface.asked and not folder.exists()


def test_too_little_disk_space_is_told_with_both_numbers_before_any_file_is_fetched(
    folder, settings, huggingface, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10_000))
    with pytest.raises(UserError, match=r"needs 0\.0 GB and its disk has 0\.0 GB free"):
        download(MODEL, folder, "huggingface", None, settings)
    assert not huggingface.file_requests()


def test_what_is_there_already_needs_no_space(folder, settings, hub_files, monkeypatch):
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(hub_files[WEIGHTS])
    (folder / "model-00002-of-00002.safetensors.part").write_bytes(hub_files["model-00002-of-00002.safetensors"][:7000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 1500))
    download(MODEL, folder, "huggingface", None, settings)


def test_two_processes_at_once_fetch_every_file_once(tmp_path, settings, huggingface, wanted):
    huggingface.gate.clear()
    first = glm(MODEL, cwd=tmp_path, settings=settings)
    while not huggingface.file_requests():
        time.sleep(0.01)
    second = glm(MODEL, cwd=tmp_path, settings=settings)
    assert "another process downloads into models/chatglm3-6b-original; waiting for it" in second.stderr.readline()
    huggingface.gate.set()
    errors = [run.communicate()[1] for run in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert "10 of 10 files are complete" in errors[1]
    assert Counter(asked.path.rpartition("/")[2] for asked in huggingface.file_requests()) == dict.fromkeys(
        wanted - {"special_tokens_map.json"},
        1,  # which is empty
    )


def test_stdout_is_the_folder_and_stderr_names_the_next_command(tmp_path, settings, wanted):
    run = glm(MODEL, cwd=tmp_path, settings=settings)
    out, err = run.communicate()
    assert (run.returncode, out) == (0, "models/chatglm3-6b-original\n"), err
    assert err.endswith("next: glm convert models/chatglm3-6b-original models/chatglm3-6b\n")
    assert f"at commit {PINNED}: 0 of 10 files are complete" in err
    assert f"{WEIGHTS}: 10.2kB, 10 of 10" in err  # a line for each file where there is no terminal for a bar
    assert names(tmp_path / "models/chatglm3-6b-original") == wanted


def test_nothing_is_written_outside_the_folder_nor_told_of_this_machine(tmp_path, settings, huggingface):
    run = glm(MODEL, "--output-dir", "out", cwd=tmp_path, settings=settings)
    _, err = run.communicate()
    assert run.returncode == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no HOME, no cache
    agents = {asked.headers["user-agent"] for asked in huggingface.asked}
    assert not any("torch" in agent for agent in agents), agents


def test_neither_the_token_nor_a_signed_address_reaches_a_log(tmp_path, settings):
    run = glm(MODEL, "--log-level", "debug", cwd=tmp_path, settings=settings)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert not any(secret in out + err for secret in ("opensesame", "signature"))


def test_the_stand_in_satisfies_the_own_client_of_hugging_face(tmp_path, huggingface, hub_files, commit):
    for name in ("config.json", WEIGHTS):
        path = hf_hub_download(huggingface.repo, name, revision=commit, endpoint=huggingface.url, local_dir=tmp_path)
        assert Path(path).read_bytes() == hub_files[name]


def test_offline_is_obeyed_and_said(tmp_path, settings, huggingface):
    run = glm(MODEL, cwd=tmp_path, settings=settings, HF_HUB_OFFLINE="1")
    _, err = run.communicate()
    assert run.returncode == 1
    assert err == "glm: HF_HUB_OFFLINE=1 forbids to fetch anything; set HF_HUB_OFFLINE=0 for this command\n"
    assert not huggingface.asked


def test_the_help_imports_neither_torch_nor_a_hub_library(tmp_path):
    heavy = "{'torch', 'huggingface_hub', 'modelscope', 'httpx2', 'tqdm'}"
    code = f"import sys, entrypoints.jobs.download; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
