"""Which files `glm download` fetches, from which hub and commit, and what it writes."""

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

from entrypoints.checkpoint.family_evidence import families_in_name
from entrypoints.errors import UserError
from entrypoints.hub.download import KNOWN_MODELS, canonical_name, download

MODEL = "THUDM/chatglm3-6b"
PINNED = KNOWN_MODELS[MODEL]["huggingface"].revision
WEIGHTS = "model-00001-of-00002.safetensors"


def file_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {"download.json", ".download.lock"}


def record(folder: Path) -> dict:
    return json.loads((folder / "download.json").read_text())


def glm(*words: str, cwd: Path, settings, **env: str) -> subprocess.Popen:
    """`glm download` as a user starts it, with only PATH of this environment."""
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
def test_every_selected_file_is_downloaded_with_a_record_of_source_commit_size_and_hash(
    folder, settings, hub_files, wanted, source, commit
):
    download(MODEL, folder, source, None, settings)
    assert file_names(folder) == wanted
    written = record(folder)
    assert (written["source"], written["commit"]) == (source, commit)
    assert {file["path"] for file in written["files"]} == wanted
    for file in written["files"]:
        body = (folder / file["path"]).read_bytes()
        assert body == hub_files[file["path"]]
        assert (file["size"], file["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def test_bin_weights_are_downloaded_if_there_are_no_safetensors(folder, settings, huggingface):
    for files in huggingface.revisions.values():
        for name in [name for name in files if ".safetensors" in name]:
            del files[name]
    download(MODEL, folder, "huggingface", None, settings)
    assert {name for name in file_names(folder) if "model" in name and not name.startswith("token")} == {
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    }


def test_the_models_are_known_by_every_name_of_their_organization():
    assert len(KNOWN_MODELS) == 13
    for model, repositories in KNOWN_MODELS.items():
        assert (
            canonical_name(model.replace("THUDM", "zai-org"))
            == canonical_name(repositories["modelscope"].repo)
            == model
        )
    assert canonical_name("ZhipuAI/glm-4-32b") == "ZhipuAI/glm-4-32b"


def test_the_name_of_every_known_model_tells_its_family():
    families = {name: families_in_name(name) for name in KNOWN_MODELS}
    assert {name: len(found) for name, found in families.items()} == dict.fromkeys(KNOWN_MODELS, 1)
    assert Counter(family for found in families.values() for family in found) == {
        "chatglm3": 4, "chatglm2": 2, "codegeex2": 1, "glm4": 6
    }  # fmt: skip


def test_the_pinned_commit_is_requested_and_every_file_is_downloaded_from_it(folder, settings, huggingface):
    download("zai-org/chatglm3-6b", folder, "auto", None, settings)
    assert huggingface.requests[0].path == f"/api/models/{MODEL}/revision/{PINNED}"
    assert len(huggingface.file_requests()) == 9
    assert all(f"/resolve/{PINNED}/" in request.path for request in huggingface.file_requests())


def test_a_branch_is_resolved_to_a_commit_once(folder, settings, modelscope, commit):
    download(MODEL, folder, "modelscope", None, settings)
    assert [request.query["Revision"] for request in modelscope.requests] == ["master"] + [commit] * 9


def test_a_later_run_resumes_at_the_recorded_commit_although_the_branch_moved(
    folder, settings, huggingface, commit, later
):
    huggingface.statuses[f"/{WEIGHTS}"] = [403]
    with pytest.raises(UserError):
        download(MODEL, folder, "huggingface", "main", settings)
    huggingface.revisions[later] = {name: body + b"!" for name, body in huggingface.revisions[commit].items()}
    huggingface.branches["main"] = later
    download(MODEL, folder, "auto", None, settings)
    assert record(folder)["commit"] == commit
    assert all(f"/resolve/{commit}/" in request.path for request in huggingface.file_requests())


def test_a_second_run_makes_no_request(folder, settings, huggingface):
    download(MODEL, folder, "auto", None, settings)
    unreachable = replace(settings, hf_endpoint="http://127.0.0.1:1", modelscope_endpoint="http://127.0.0.1:1")
    before_count = len(huggingface.requests)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "download.json"}
    download(MODEL, folder, "auto", None, unreachable)
    download("ZhipuAI/chatglm3-6b", folder, "huggingface", PINNED[:7], unreachable)
    assert len(huggingface.requests) == before_count
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
def test_a_folder_with_another_download_is_rejected(folder, settings, model, source, revision):
    download(MODEL, folder, "huggingface", None, settings)
    with pytest.raises(UserError, match=rf"contains zai-org/chatglm3-6b of huggingface .*{PINNED}, not .*--output-dir"):
        download(model, folder, source, revision, settings)


def test_only_a_file_that_was_removed_or_truncated_is_downloaded_again(
    folder, settings, huggingface, storage, hub_files
):
    download(MODEL, folder, "huggingface", None, settings)
    (folder / "config.json").unlink()
    (folder / WEIGHTS).write_bytes(b"short")
    huggingface.requests.clear()
    download(MODEL, folder, "huggingface", None, settings)
    assert [request.path.rpartition("/")[2] for request in huggingface.requests] == ["config.json", WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_a_git_clone_is_completed_and_its_lfs_pointers_are_replaced(folder, settings, huggingface, storage, hub_files):
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes(hub_files[name])
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10240\n")
    download(MODEL, folder, "huggingface", None, settings)
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]
    assert not huggingface.requests_for("config.json")
    assert not storage.requests_for("tokenizer.model")


def test_files_of_another_origin_are_never_overwritten(folder, settings, huggingface):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "xhatglm"}')  # of the same length as the hub's
    with pytest.raises(
        UserError, match=r"contains other files under the names config\.json; choose an empty --output-dir"
    ):
        download(MODEL, folder, "huggingface", None, settings)
    assert (folder / "config.json").read_text() == '{"model_type": "xhatglm"}'
    assert not huggingface.file_requests()


def test_auto_uses_modelscope_if_hugging_face_is_unreachable(folder, settings, caplog):
    download(MODEL, folder, "auto", None, replace(settings, hf_endpoint="http://127.0.0.1:1"))
    assert record(folder)["source"] == "modelscope"
    assert "cannot be reached ([Errno 111] Connection refused)" in caplog.text


def test_auto_uses_modelscope_if_hugging_face_lacks_the_model(folder, settings, huggingface, caplog):
    huggingface.repo = "zai-org/another"
    download(MODEL, folder, "auto", None, settings)
    assert record(folder)["repo"] == "ZhipuAI/chatglm3-6b"
    assert "THUDM/chatglm3-6b on 127.0.0.1 does not exist" in caplog.text


def test_a_named_source_is_the_only_one_contacted(folder, settings, modelscope):
    with pytest.raises(UserError, match="cannot be reached"):
        download(MODEL, folder, "huggingface", None, replace(settings, hf_endpoint="http://127.0.0.1:1"))
    assert not modelscope.requests


def test_a_mirror_is_the_only_host_contacted(folder, settings, huggingface, storage, monkeypatch):
    contacted = set()
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda to, *rest, **more: contacted.add(to) or connect(to, *rest, **more)
    )
    download(MODEL, folder, "auto", None, replace(settings, hf_endpoint=f"{huggingface.url}/"))
    assert contacted == {("127.0.0.1", huggingface.port), ("127.0.0.1", storage.port)}


def test_the_token_is_sent_only_to_the_hub(folder, tmp_path, settings, huggingface, storage, modelscope):
    download(MODEL, folder, "huggingface", None, settings)
    download(MODEL, tmp_path / "other", "modelscope", None, settings)
    assert all(request.headers["authorization"] == "Bearer hf_opensesame" for request in huggingface.requests)
    assert len(storage.requests) == 3  # two shards and tokenizer.model
    assert not any("hf_opensesame" in str(request) for request in storage.requests + modelscope.requests)


def test_any_other_model_is_downloaded_under_its_own_name(folder, settings, huggingface):
    huggingface.repo = "me/my-glm"
    download("me/my-glm", folder, "auto", None, settings)
    assert huggingface.requests[0].path == "/api/models/me/my-glm/revision/main"


@pytest.mark.parametrize("name", ["chatglm3-6b", "a/b/c", "../etc", "a/b c", "a/../b", "", "https://hf.co/a/b"])
def test_a_name_that_is_not_org_slash_name_is_rejected(folder, settings, huggingface, name):
    with pytest.raises(UserError, match="use ORG/NAME, for example THUDM/chatglm3-6b"):
        download(name, folder, "auto", None, settings)
    assert not huggingface.requests
    assert not folder.exists()


def test_too_little_disk_space_is_reported_with_both_values_before_any_file_is_downloaded(
    folder, settings, huggingface, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10_000))
    with pytest.raises(UserError, match=r"needs .*B, its disk has .* free"):
        download(MODEL, folder, "huggingface", None, settings)
    assert not huggingface.file_requests()


def test_existing_files_need_no_space(folder, settings, hub_files, monkeypatch):
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(hub_files[WEIGHTS])
    (folder / "model-00002-of-00002.safetensors.part").write_bytes(hub_files["model-00002-of-00002.safetensors"][:7000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 1500))
    download(MODEL, folder, "huggingface", None, settings)


def test_two_processes_at_once_download_every_file_once(tmp_path, settings, huggingface, wanted):
    huggingface.gate.clear()
    first = glm(MODEL, cwd=tmp_path, settings=settings)
    while not huggingface.file_requests():
        time.sleep(0.01)
    second = glm(MODEL, cwd=tmp_path, settings=settings)
    assert "another process is downloading to models/chatglm3-6b-original; waiting for it" in second.stderr.readline()
    huggingface.gate.set()
    errors = [run.communicate()[1] for run in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert "10 of 10 files are complete" in errors[1]
    assert Counter(request.path.rpartition("/")[2] for request in huggingface.file_requests()) == dict.fromkeys(
        wanted - {"special_tokens_map.json"},
        1,  # that file is empty
    )


def test_stdout_is_the_folder_and_stderr_names_the_next_command(tmp_path, settings, wanted):
    run = glm(MODEL, cwd=tmp_path, settings=settings)
    out, err = run.communicate()
    assert (run.returncode, out) == (0, "models/chatglm3-6b-original\n"), err
    assert err.endswith("next: glm convert models/chatglm3-6b-original models/chatglm3-6b\n")
    assert f"at commit {PINNED}: 0 of 10 files are complete" in err
    assert f"{WEIGHTS}: 10.2kB, 10 of 10" in err  # one line per file if there is no terminal for a progress bar
    assert file_names(tmp_path / "models/chatglm3-6b-original") == wanted


def test_nothing_is_written_outside_the_folder_and_no_machine_details_are_sent(tmp_path, settings, huggingface):
    run = glm(MODEL, "--output-dir", "out", cwd=tmp_path, settings=settings)
    _, err = run.communicate()
    assert run.returncode == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no HOME, no cache
    agents = {request.headers["user-agent"] for request in huggingface.requests}
    assert not any("torch" in agent for agent in agents), agents


def test_neither_the_token_nor_a_signed_url_is_logged(tmp_path, settings):
    run = glm(MODEL, "--log-level", "debug", cwd=tmp_path, settings=settings)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert not any(secret in out + err for secret in ("opensesame", "signature"))


def test_the_simulated_hub_works_with_the_client_of_hugging_face(tmp_path, huggingface, hub_files, commit):
    for name in ("config.json", WEIGHTS):
        path = hf_hub_download(huggingface.repo, name, revision=commit, endpoint=huggingface.url, local_dir=tmp_path)
        assert Path(path).read_bytes() == hub_files[name]


def test_offline_mode_is_obeyed_and_reported(tmp_path, settings, huggingface):
    run = glm(MODEL, cwd=tmp_path, settings=settings, HF_HUB_OFFLINE="1")
    _, err = run.communicate()
    assert run.returncode == 1
    assert err == "glm: HF_HUB_OFFLINE=1 forbids downloads; set HF_HUB_OFFLINE=0 for this command\n"
    assert not huggingface.requests


def test_the_help_imports_neither_torch_nor_a_hub_library(tmp_path):
    heavy = "{'torch', 'huggingface_hub', 'modelscope', 'httpx2', 'tqdm'}"
    code = f"import sys, entrypoints.jobs.download; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
