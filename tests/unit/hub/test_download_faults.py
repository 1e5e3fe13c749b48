"""`glm download` when the network, a hub or the disk fails: one message, and the same command resumes."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from entrypoints.errors import UserError
from entrypoints.hub import listing, transfer
from entrypoints.hub.download import KNOWN_MODELS, download
from entrypoints.settings import Secret

MODEL = "THUDM/chatglm3-6b"
PINNED = KNOWN_MODELS[MODEL]["huggingface"].revision
SMALLER, WEIGHTS = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"


def ranges(requests: list) -> list[str | None]:
    return [request.headers.get("range") for request in requests]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_lost_connection_is_resumed_at_the_next_byte(folder, settings, storage, modelscope, hub_files, source):
    server = storage if source == "huggingface" else modelscope  # which responds to a range with status 200
    server.cuts[WEIGHTS] = [1000, 500]
    download(MODEL, folder, source, None, settings)
    assert ranges(server.requests_for(WEIGHTS)) == [None, "bytes=1000-", "bytes=1500-"]
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_attempts_are_bounded_and_the_next_run_resumes_after_the_bytes_received(folder, settings, storage, hub_files):
    storage.cuts[WEIGHTS] = [100] * transfer.MAX_ATTEMPTS
    with pytest.raises(UserError) as caught:
        download(MODEL, folder, "huggingface", None, settings)
    assert caught.value.problem.startswith(f"{WEIGHTS}: {transfer.MAX_ATTEMPTS} attempts failed, the last one with: ")
    assert caught.value.problem.endswith(f"(9 of 10 files are complete in {folder})")
    assert caught.value.remedy == "run the same command again: it resumes"
    assert len(storage.requests_for(WEIGHTS)) == transfer.MAX_ATTEMPTS
    storage.requests.clear()
    download(MODEL, folder, "auto", None, settings)
    assert ranges(storage.requests) == [f"bytes={100 * transfer.MAX_ATTEMPTS}-"]
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_attempts_that_make_progress_are_not_counted(folder, settings, storage, monkeypatch):
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 100)
    storage.cuts[WEIGHTS] = [100] * 20
    download(MODEL, folder, "huggingface", None, settings)
    assert len(storage.requests_for(WEIGHTS)) == 21


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(folder, settings, storage, hub_files):
    storage.ignores_range = True
    storage.cuts[WEIGHTS] = [1000]
    download(MODEL, folder, "huggingface", None, settings)
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_an_interrupted_run_is_resumed(tmp_path, settings, storage, huggingface, hub_files):
    """Ctrl-C during a file: exit code 130, no traceback, and the part is kept."""
    storage.gate.clear()
    command = [sys.executable, "-m", "entrypoints", "download", MODEL, "--output-dir", "out"]
    env = {"HF_ENDPOINT": settings.hf_endpoint, "HOME": str(tmp_path / "home")}
    run = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    while not storage.requests_for("tokenizer.model"):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate()
    assert (run.returncode, err.splitlines()[-1]) == (130, "glm: interrupted")
    assert "Traceback" not in err
    storage.gate.set()
    (tmp_path / "out" / f"{WEIGHTS}.part").write_bytes(hub_files[WEIGHTS][:77])
    storage.requests.clear()
    huggingface.requests.clear()
    download(MODEL, tmp_path / "out", "auto", None, settings)
    assert len(huggingface.requests) == 3  # the three large files; the small ones were complete
    assert ranges(storage.requests_for(WEIGHTS)) == ["bytes=77-"]


@pytest.mark.parametrize(
    ("left", "has_plausible_size"), [(b"x" * 10_240, True), (b"x" * 20_000, False), (b"x" * 50, True)]
)
def test_a_part_that_is_not_the_start_of_the_file_is_deleted(folder, settings, hub_files, left, has_plausible_size):
    folder.mkdir()
    (folder / f"{WEIGHTS}.part").write_bytes(left)
    if has_plausible_size:  # detected only by the digest of the complete file
        with pytest.raises(UserError, match=f"{WEIGHTS} is damaged"):
            download(MODEL, folder, "huggingface", None, settings)
    download(MODEL, folder, "huggingface", None, settings)
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_a_part_that_the_server_does_not_resume_is_deleted(folder, settings, huggingface, hub_files):
    folder.mkdir()
    (folder / f"{WEIGHTS}.part").write_bytes(b"x" * 50)
    huggingface.statuses[f"/{WEIGHTS}"] = [416]
    download(MODEL, folder, "huggingface", None, settings)
    assert ranges([request for request in huggingface.requests if request.path.endswith(WEIGHTS)]) == [
        "bytes=50-",
        None,
    ]
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transient_error_of_the_hub_is_retried(folder, settings, huggingface, status):
    huggingface.statuses = {f"/{PINNED}": [status], f"/{WEIGHTS}": [status, status]}
    download(MODEL, folder, "huggingface", None, settings)
    assert len([request for request in huggingface.requests if request.path.endswith(WEIGHTS)]) == 3


def test_a_denial_by_the_storage_is_retried_with_a_new_url_from_the_hub(folder, settings, huggingface, storage):
    storage.statuses[f"/{WEIGHTS}"] = [403]
    download(MODEL, folder, "huggingface", None, settings)
    assert len([request for request in huggingface.requests if request.path.endswith(WEIGHTS)]) == 2


def test_a_hub_that_stays_down_is_contacted_a_bounded_number_of_times(folder, settings, huggingface, caplog):
    huggingface.statuses[f"/{PINNED}"] = [502] * 100
    download(MODEL, folder, "auto", None, settings)
    assert len(huggingface.requests) == listing.MAX_ATTEMPTS
    assert "the hub responds with status 502" in caplog.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"short", "the server offers 5 bytes, the hub lists 10240 bytes"),
        (b"x" * 20_000, "the server offers 20000 bytes, the hub lists 10240 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10240\n",
            "the server offers a Git LFS pointer instead of the file, the hub lists 10240 bytes",
        ),
    ],
)
def test_a_file_of_the_wrong_size_is_rejected_before_it_is_written(folder, settings, huggingface, body, message):
    huggingface.bodies[WEIGHTS] = body
    huggingface.storage = None
    with pytest.raises(UserError, match=rf"{WEIGHTS}: {message} \(9 of 10 .*run the same command again"):
        download(MODEL, folder, "huggingface", None, settings)
    assert not (folder / WEIGHTS).exists()
    assert not (folder / f"{WEIGHTS}.part").exists()
    huggingface.bodies.clear()
    download(MODEL, folder, "huggingface", None, settings)


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])  # by SHA-256, and by git's blob id
def test_a_file_with_the_wrong_digest_is_rejected_and_downloaded_again_by_the_next_run(
    folder, settings, storage, huggingface, hub_files, file
):
    storage.bodies[file] = huggingface.bodies[file] = b"!" * len(hub_files[file])
    with pytest.raises(UserError, match=rf"{file} is damaged.*run the same command again"):
        download(MODEL, folder, "huggingface", None, settings)
    assert not (folder / file).exists()
    storage.bodies.clear()
    huggingface.bodies.clear()
    download(MODEL, folder, "huggingface", None, settings)
    assert (folder / file).read_bytes() == hub_files[file]


def test_a_model_that_no_hub_has_is_reported_for_each_hub(folder, settings):
    with pytest.raises(UserError) as caught:
        download("THUDM/chatglm4-6b", folder, "auto", None, settings)
    assert caught.value.problem == (
        "THUDM/chatglm4-6b on 127.0.0.1 does not exist, or is private; THUDM/chatglm4-6b on 127.0.0.1 does not exist"
    )


def test_without_a_token_a_missing_model_may_be_a_private_one(folder, settings):
    """Hugging Face responds 401, not 404, to requests without a token."""
    with pytest.raises(UserError, match=r"does not exist, or is private; check the name, or set HF_TOKEN"):
        download("me/my-glm", folder, "huggingface", None, replace(settings, hf_token=Secret()))


@pytest.mark.parametrize("source", ["auto", "huggingface", "modelscope"])
def test_a_revision_that_does_not_exist_is_named_and_no_other_is_used(folder, settings, source):
    with pytest.raises(UserError, match=r"has no revision v9; name another one with --revision, for example ma"):
        download(MODEL, folder, source, "v9", settings)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_needs_a_token(folder, settings, huggingface, status):
    huggingface.gated_status = status
    with pytest.raises(UserError, match=rf"denies access \({status}\) .*accept its terms .* set HF_TOKEN"):
        download(MODEL, folder, "huggingface", None, replace(settings, hf_token=Secret()))
    download(MODEL, folder, "huggingface", None, settings)


@pytest.mark.parametrize("status", [401, 403])
def test_a_listing_that_is_denied_needs_a_token(folder, settings, huggingface, modelscope, status):
    huggingface.statuses[f"/{PINNED}"] = [status]
    with pytest.raises(UserError, match="HF_TOKEN"):
        download(MODEL, folder, "huggingface", None, settings)
    modelscope.statuses["/repo/files"] = [status]
    with pytest.raises(UserError, match=rf"access to ZhipuAI/chatglm3-6b on 127.0.0.1 is denied \({status}\)"):
        download(MODEL, folder, "modelscope", None, settings)


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_the_login_page_of_a_network_is_not_accepted_as_a_response(folder, settings, huggingface, modelscope, source):
    huggingface.is_login_page = modelscope.is_login_page = True
    with pytest.raises(UserError, match=r"the response is not that of"):
        download(MODEL, folder, source, None, settings)


def test_an_endpoint_without_scheme_is_named(folder, settings):
    with pytest.raises(UserError, match="HF_ENDPOINT does not start with https://"):
        download(MODEL, folder, "auto", None, replace(settings, hf_endpoint="hf-mirror.com"))


def test_a_repository_without_weights_is_rejected(folder, settings, huggingface):
    for files in huggingface.revisions.values():
        for name in [name for name in files if name.startswith(("model", "pytorch_model"))]:
            del files[name]
    with pytest.raises(UserError, match=r"chatglm3-6b on huggingface contains no checkpoint"):
        download(MODEL, folder, "huggingface", None, settings)


def test_complete_files_are_kept_when_the_disk_fills_up(folder, settings, hub_files, monkeypatch):
    """The part is a link to /dev/full: every write to it fails with a real ENOSPC."""
    folder.mkdir()
    (folder / f"{WEIGHTS}.part").symlink_to("/dev/full")
    monkeypatch.setattr(transfer, "confined_path", lambda folder, name, source: folder / name)  # allow this link
    with pytest.raises(UserError, match=r"cannot write in .*No space left on device.*complete files are kept"):
        download(MODEL, folder, "huggingface", None, settings)
    assert (folder / SMALLER).read_bytes() == hub_files[SMALLER]
    (folder / f"{WEIGHTS}.part").unlink()
    download(MODEL, folder, "auto", None, settings)
    assert (folder / WEIGHTS).read_bytes() == hub_files[WEIGHTS]


def test_an_output_folder_that_cannot_be_created_is_rejected(tmp_path, settings, huggingface):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder with --output-dir"):
        download(MODEL, tmp_path / "file", "auto", None, settings)
    with pytest.raises(UserError, match=r"cannot write in .*file/sub \(Not a directory\)"):
        download(MODEL, tmp_path / "file" / "sub", "auto", None, settings)
    assert not huggingface.requests


def test_a_damaged_record_is_named(folder, settings):
    folder.mkdir()
    (folder / "download.json").write_text("{")
    with pytest.raises(UserError, match=r"download\.json is not valid JSON .*remove it"):
        download(MODEL, folder, "auto", None, settings)
