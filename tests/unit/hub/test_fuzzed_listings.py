"""What a hub, or somebody in its place, may answer to a request for the files of a model."""

import gzip
import itertools
import json

import httpx2
import pytest
from fuzzing import fuzz
from mutations import HOSTILE_TEXTS, damage_bytes, damage_json_text

from entrypoints.errors import UserError
from entrypoints.hub import listing
from entrypoints.hub.download import _check_record, _mark_complete_files
from entrypoints.hub.listing import file_url, list_files, select_files
from entrypoints.hub.record import DownloadRecord, read_download_record
from entrypoints.settings import Secret

pytestmark = pytest.mark.fuzz
COMMIT = "c0ffee" + "0" * 34
HASH = "0" * 64
REPO = "THUDM/chatglm3-6b"
SIBLINGS = [
    {"rfilename": "config.json", "size": 24, "blobId": "1" * 40},
    {"rfilename": "model.safetensors", "size": 9000, "blobId": "2" * 40, "lfs": {"sha256": HASH, "size": 9000}},
]
BLOBS = [
    {"Path": name, "Type": "blob", "Size": 24, "Sha256": HASH, "Revision": COMMIT, "CommittedDate": 5}
    for name in ("config.json", "model.safetensors")
]
HUBS = {
    "huggingface": {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": SIBLINGS},
    "modelscope": {"Code": 200, "Success": True, "Data": {"Files": BLOBS, "LatestCommitter": {"ShortId": "c0ffee00"}}},
}
STATUSES = (200, 204, 206, 301, 302, 304, 400, 401, 403, 404, 418, 429, 500, 503, 599)
RECORD = {
    "version": 1, "model": REPO, "source": "huggingface", "repo": REPO, "revision": "main", "commit": COMMIT,
    "files": [{"path": "config.json", "size": 2, "commit": COMMIT, "digest": HASH, "sha256": ""},
              {"path": "model.safetensors", "size": 3, "commit": COMMIT, "digest": HASH, "sha256": HASH}],
}  # fmt: skip


class Endless(httpx2.SyncByteStream):
    """A body without an end."""

    def __iter__(self):
        return itertools.repeat(b"[" * 65536)


def answer(value, chance):
    """A response whose body should hold `value`."""
    kind = chance.randrange(10)
    headers = {"X-Error-Code": chance.choice(("RepoNotFound", "GatedRepo", "RevisionNotFound", "?"))}
    if kind == 0:
        status = chance.choice(STATUSES)
        location = chance.choice(("/", "http://169.254.169.254/", "file:///etc/passwd", "//", "http://[", "\x7f"))
        return httpx2.Response(status, headers={**headers, "Location": location}, content=b"{}")
    if kind == 1:
        return httpx2.Response(200, stream=Endless())
    if kind == 2:
        bomb = gzip.compress(b" " * (100 << 20), 1)
        return httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx2.ByteStream(bomb))
    if kind == 3:
        damaged = damage_bytes(gzip.compress(json.dumps(value).encode()), chance)
        return httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx2.ByteStream(damaged))
    return httpx2.Response(200, content=damage_json_text(value, chance))


@pytest.mark.slow
@pytest.mark.parametrize("source", HUBS)
def test_listings_of_hubs(source, monkeypatch, tmp_path):
    def attempt(chance):
        transport = httpx2.MockTransport(lambda _: answer(HUBS[source], chance))
        with httpx2.Client(transport=transport, follow_redirects=True) as client:
            monkeypatch.setattr(listing, "get_session", lambda: client)
            revision = chance.choice(("main", COMMIT, chance.choice(HOSTILE_TEXTS)[:99]))
            if not revision.isprintable():
                revision = "main"  # a flag of the command line, which no hub chooses
            found = list_files(source, REPO, revision, "http://127.0.0.1:9", Secret("hf_x"))
        for file in select_files(found.files, REPO):
            assert file_url(source, REPO, file, "http://127.0.0.1:9").startswith("http://127.0.0.1:9/")
            assert tmp_path in (tmp_path / file.path).resolve().parents
        DownloadRecord(REPO, source, found.repo, "main", found.commit, found.files).write(tmp_path)
        read_download_record(tmp_path)

    fuzz(f"listings_of_hubs[{source}]", attempt, 150)


def test_download_records(tmp_path):
    """Of a folder from elsewhere."""
    (tmp_path / "config.json").write_text("{}")

    def attempt(chance):
        (tmp_path / "download.json").write_bytes(damage_json_text(RECORD, chance))
        record = read_download_record(tmp_path)
        _check_record(record, tmp_path)
        record.check_request(tmp_path, REPO, "auto", None)
        _mark_complete_files(record, tmp_path)

    fuzz("download_records", attempt, 400)


@pytest.mark.parametrize(
    "body", [Endless(), httpx2.ByteStream(gzip.compress(b" " * (64 << 20)))], ids=["endless", "gzip"]
)
@pytest.mark.parametrize("source", HUBS)
def test_a_listing_without_end_is_given_up(source, body, monkeypatch):
    """Also one that is small until it is decompressed."""
    headers = {} if isinstance(body, Endless) else {"Content-Encoding": "gzip"}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, stream=body))
    monkeypatch.setattr(listing, "get_session", lambda: httpx2.Client(transport=transport))
    with pytest.raises(UserError, match=r"127\.0\.0\.1 lists files in more than 8 MB"):
        list_files(source, REPO, "main", "http://127.0.0.1:9", Secret(""))


@pytest.mark.parametrize("source", HUBS)
def test_a_listing_that_arrives_too_slowly_is_given_up(source, monkeypatch):
    clock = itertools.count(step=30)
    monkeypatch.setattr(listing.time, "monotonic", lambda: next(clock))
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, stream=Endless()))
    monkeypatch.setattr(listing, "get_session", lambda: httpx2.Client(transport=transport))
    with pytest.raises(UserError, match=r"127\.0\.0\.1 lists files in more than 120 s"):
        list_files(source, REPO, "main", "http://127.0.0.1:9", Secret(""))


@pytest.mark.parametrize("source", HUBS)
def test_a_path_that_is_listed_twice_is_rejected(source, monkeypatch):
    value = json.loads(json.dumps(HUBS[source]))
    entries = value["siblings"] if source == "huggingface" else value["Data"]["Files"]
    entries.append({**entries[0], "size": 5, "Size": 5})
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=value))
    monkeypatch.setattr(listing, "get_session", lambda: httpx2.Client(transport=transport))
    with pytest.raises(UserError, match="the response is not that of"):
        list_files(source, REPO, "main", "http://127.0.0.1:9", Secret(""))


@pytest.mark.parametrize("source", HUBS)
def test_a_commit_that_is_not_a_hash_is_rejected(source, monkeypatch):
    text = json.dumps(HUBS[source]).replace(COMMIT, "${x}").replace("c0ffee00", "${x}")
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=text.encode()))
    monkeypatch.setattr(listing, "get_session", lambda: httpx2.Client(transport=transport))
    with pytest.raises(UserError, match="the response is not that of"):
        list_files(source, REPO, "main", "http://127.0.0.1:9", Secret(""))
