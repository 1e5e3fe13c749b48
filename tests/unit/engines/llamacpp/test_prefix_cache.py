"""KV caches of prompts in files: what a second engine reads again, for whom, and what damages do."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.manifest import write_file_record
from entrypoints.engines.llamacpp import prefix_store
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.llamacpp.slot_files import SOCKET_NAME, SlotFiles
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError

CONVERSATION = [id_ % 1900 + 100 for id_ in range(0, 800 * 7, 7)]


def greedy(owner):
    return Sampling(max_new_tokens=8, temperature=0, cache_salt=owner)


@pytest.fixture(scope="module")
def model(toy_gguf, tmp_path_factory):
    """The tiny model with the record that `glm quantize` writes."""
    file = tmp_path_factory.mktemp("model") / "toy.gguf"
    shutil.copy(toy_gguf, file)
    write_file_record(file, file)
    return file


@pytest.fixture
def start(model, tmp_path):
    """Starts engines that keep their prefixes in one folder, and closes them at the end."""
    engines = []

    def load(slots=2, **options):
        options = {"prefix_cache": tmp_path / "cache", "threads": 1, "slots": slots} | options
        engines.append(LlamaCppEngine.load(model, EngineOptions(**options)))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def ask(engine, prompt, owner="alice"):
    """The answer, and the number of prompt tokens that llama.cpp computed for it, by its own count."""
    progress, server = [], engine._streams._server

    class Listening:
        def handle_completions(self, request, receive):
            def listen(chunk):
                progress.append(chunk.get("prompt_progress"))
                return receive(chunk)

            server.handle_completions(request, listen)

    engine._streams._server = Listening()
    try:
        answer = [int(token) for token in engine.generate(prompt, greedy(owner))]
    finally:
        engine._streams._server = server
    first = next(filter(None, progress))
    return answer, first["total"] - first["cache"]


def states(folder):
    return sorted(Path(folder).rglob("*.state"))


def test_a_second_engine_answers_a_known_conversation_without_computing_it_again(start, llama):
    first = start()
    answer, computed = ask(first, CONVERSATION)
    assert computed == 800
    first.close()
    second = start()
    assert ask(second, CONVERSATION) == (answer, 1)  # llama.cpp always computes the last id
    question = [*CONVERSATION, *answer, 105, 106, 107]
    longer, computed = ask(second, question)
    assert computed <= 4
    assert longer == [int(token) for token in llama.generate(question, greedy(""))]  # as without a cache


def test_a_conversation_that_gave_its_slot_to_another_one_is_read_from_its_file(start):
    engine = start(slots=1)
    answer, _ = ask(engine, CONVERSATION)
    ask(engine, CONVERSATION[::-1])
    assert ask(engine, CONVERSATION) == (answer, 1)


def test_a_conversation_that_shares_most_of_its_slot_with_the_next_one_is_kept_too(start):
    """The same instructions, and questions that are shorter than these."""
    engine = start(slots=2)
    first, second = [*CONVERSATION, *range(200, 350)], [*CONVERSATION, *range(600, 750)]
    answer, _ = ask(engine, first)
    ask(engine, second)
    assert ask(engine, first) == (answer, 1)


def test_a_scored_prompt_is_not_kept(start, tmp_path):
    engine = start()
    assert len(engine.score(CONVERSATION[:100], 1)) == 100
    engine.close()
    assert states(tmp_path) == []


def test_no_client_profits_from_what_another_one_asked(start):
    """Neither in memory nor from a file: the time of an answer would reveal it."""
    first = start(slots=1)
    ask(first, CONVERSATION, "alice")
    assert ask(first, CONVERSATION, "bob")[1] == 800
    assert ask(first, CONVERSATION, "alice")[1] == 1
    first.close()
    assert ask(start(), CONVERSATION, "carol")[1] == 800


def test_a_prompt_of_the_operator_is_computed_once_for_all_clients(start):
    start().warm(CONVERSATION)
    second = start()
    for owner in ("alice", "bob"):
        assert ask(second, [*CONVERSATION, 105, 106], owner)[1] == 2


def test_a_prompt_that_is_kept_already_is_not_computed_when_the_server_warms_up(start, tmp_path):
    first = start()
    first.warm(CONVERSATION)
    first.close()
    (written,) = states(tmp_path)
    before = written.stat().st_ctime_ns
    start().warm(CONVERSATION)
    assert states(tmp_path) == [written] or written.stat().st_ctime_ns == before


def test_a_state_with_another_hash_is_removed_and_its_prompt_computed(start, tmp_path, caplog):
    first = start()
    answer, _ = ask(first, CONVERSATION)
    first.close()
    (file,) = states(tmp_path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    second = start()
    assert ask(second, CONVERSATION) == (answer, 800)
    assert "does not match its SHA-256" in caplog.text


@pytest.mark.parametrize(
    "record", ["{", '{"owner": "x"}', '{"owner": "x", "sha256": "y", "tokens": [[1]]}', "[" * 9999]
)
def test_a_damaged_record_is_removed_with_its_file(record, start, tmp_path):
    first = start()
    ask(first, CONVERSATION)
    first.close()
    (file,) = states(tmp_path)
    file.with_suffix(".json").write_text(record)
    assert ask(start(), CONVERSATION)[1] == 800


def test_a_file_that_llama_cpp_rejects_is_computed_again(start, tmp_path):
    """With a correct hash, as after a change of llama.cpp's own format."""
    first = start()
    answer, _ = ask(first, CONVERSATION)
    first.close()
    (file,) = states(tmp_path)
    file.write_bytes(b"another format" * 1000)
    record = json.loads(file.with_suffix(".json").read_text())
    write_file_record(tmp_path / "x", file)
    digest = json.loads((tmp_path / "x.json").read_text())["sha256"]
    file.with_suffix(".json").write_text(json.dumps(record | {"sha256": digest}))
    assert ask(start(), CONVERSATION) == (answer, 800)


def test_the_least_recently_used_states_are_removed_when_the_folder_is_full(start, tmp_path):
    prompts = [[id_ + shift for id_ in CONVERSATION] for shift in range(4)]
    first = start(slots=1)
    ask(first, prompts[0])
    first.close()
    size = states(tmp_path)[0].stat().st_size
    second = start(slots=1, prefix_cache_bytes=int(3.5 * size))
    for prompt in (prompts[1], prompts[2], prompts[0], prompts[3]):
        ask(second, prompt)
    second.close()
    third = start(slots=1)
    assert [ask(third, prompt)[1] for prompt in prompts] == [1, 800, 1, 1]


def test_the_states_of_another_model_are_not_read(start, model, tmp_path):
    first = start()
    ask(first, CONVERSATION)
    first.close()
    other = tmp_path / "other.gguf"
    shutil.copy(model, other)
    record = json.loads(model.with_name("toy.gguf.json").read_text()) | {"sha256": "0" * 64}
    other.with_name("other.gguf.json").write_text(json.dumps(record))
    engine = LlamaCppEngine.load(other, EngineOptions(prefix_cache=tmp_path / "cache", threads=1))
    assert ask(engine, CONVERSATION)[1] == 800
    engine.close()


def test_only_this_user_can_read_the_files(start, tmp_path):
    """They contain conversations."""
    engine = start()
    ask(engine, CONVERSATION)
    engine.close()
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert all("alice" not in file.read_text(errors="replace") for file in folder.iterdir())


def test_the_socket_of_llama_cpp_needs_the_key_and_goes_with_the_engine(start, tmp_path):
    engine = start()
    folder = engine._prefix_cache._files.socket_folder
    assert folder.stat().st_mode & 0o077 == 0
    intruder = SlotFiles(tmp_path)
    (intruder.socket_folder / SOCKET_NAME).symlink_to(folder / SOCKET_NAME)
    with pytest.raises(RuntimeError, match="cannot save slot 0"):
        intruder.save(0, "stolen")
    intruder.close()
    engine.close()
    assert not folder.exists()


def test_a_call_that_is_cancelled_while_it_waits_for_a_slot_ends(start):
    engine = start(slots=1)
    running = engine.generate(CONVERSATION, Sampling(max_new_tokens=200, temperature=0))
    next(running)
    cancelled = threading.Event()
    cancelled.set()
    assert list(engine.generate([105], greedy("bob"), cancelled=cancelled)) == []
    running.close()
    assert ask(engine, CONVERSATION, "bob")[0]


def test_a_slot_is_free_only_when_llama_cpp_has_left_it(start):
    """A slot that is still computed cannot be saved or emptied, and would stop all others meanwhile."""
    engine = start(slots=1)
    cancelled = threading.Event()
    running = engine.generate(CONVERSATION, Sampling(max_new_tokens=200, temperature=0), cancelled=cancelled)
    next(running)
    cancelled.set()
    assert list(running) == []
    assert not any(call.thread.is_alive() for call in engine._streams._running)


def test_while_a_slot_is_written_other_slots_begin_and_end_answers(start, monkeypatch):
    engine = start(slots=2)
    ask(engine, CONVERSATION, "alice")
    writing, may_end, save = threading.Event(), threading.Event(), SlotFiles.save

    def slow(files, slot, name):
        writing.set()
        assert may_end.wait(30)
        return save(files, slot, name)

    running = engine.generate(CONVERSATION[:32], Sampling(max_new_tokens=200, temperature=0, cache_salt="bob"))
    next(running)
    monkeypatch.setattr(SlotFiles, "save", slow)
    waiting = threading.Thread(target=ask, args=(engine, [id_ + 1 for id_ in CONVERSATION], "carol"))
    waiting.start()
    assert writing.wait(30)
    running.close()  # frees its slot
    assert [slot.is_busy for slot in engine._prefix_cache._slots].count(True) == 1
    may_end.set()
    waiting.join()


def test_after_a_failed_restore_nothing_of_the_former_client_is_left_in_the_slot(start, monkeypatch):
    engine = start(slots=1)
    for owner in ("bob", "alice"):
        ask(engine, CONVERSATION, owner)

    def fails(files, slot, name=None):
        raise RuntimeError("the connection was lost")  # llama.cpp has not emptied the slot

    monkeypatch.setattr(SlotFiles, "restore", fails)
    with monkeypatch.context() as no_connection:
        no_connection.setattr(SlotFiles, "erase", fails)
        with pytest.raises(RuntimeError, match="the connection was lost"):
            ask(engine, CONVERSATION, "bob")
    assert ask(engine, CONVERSATION, "alice")[1] == 800
    assert ask(engine, CONVERSATION, "bob")[1] == 800


def test_a_closed_cache_is_not_read_and_loses_no_state(start, tmp_path):
    engine = start(slots=1)
    ask(engine, CONVERSATION, "alice")
    engine._prefix_cache.close()
    with pytest.raises(RuntimeError, match="the engine was closed"):
        ask(engine, [id_ + 1 for id_ in CONVERSATION], "bob")
    assert len(states(tmp_path / "cache")) == 1


def test_more_calls_than_slots_all_get_their_own_answers(start, llama):
    engine = start()
    prompts = [[id_ + shift for id_ in CONVERSATION[:100]] for shift in range(6)]
    expected = [[int(token) for token in llama.generate(prompt, greedy(""))] for prompt in prompts]
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: list(engine.generate(prompts[n], greedy(str(n))))}))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[n] for n in range(6)] == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_is_not_writable_is_named(start, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"--prefix-cache .*locked cannot be used"):
        start(prefix_cache=tmp_path / "locked")


def test_a_folder_of_which_the_states_cannot_be_changed_is_named(start, tmp_path, monkeypatch):
    """A mount that is read-only and has states already."""
    first = start()
    ask(first, CONVERSATION)
    first.close()
    monkeypatch.setattr(prefix_store.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"--prefix-cache .*cache cannot be used .*Read-only"):
        start()


def test_a_folder_that_becomes_read_only_stops_no_answer(start, tmp_path, monkeypatch, caplog):
    first = start()
    answer, _ = ask(first, CONVERSATION)
    first.close()
    second = start()
    monkeypatch.setattr(prefix_store.os, "utime", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    assert ask(second, CONVERSATION) == (answer, 800)
    assert "cannot be used" in caplog.text
    monkeypatch.undo()


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_files_that_a_dead_process_left_are_removed_and_those_that_are_written_now_are_not(tmp_path):
    (tmp_path / ("e" * 32)).mkdir()
    abandoned, written = (tmp_path / ("e" * 32) / f"{letter * 32}.partial" for letter in "ab")
    for file in (abandoned, written):
        file.write_text("x")
    os.utime(abandoned, (0, 0))
    prefix_store.PrefixStore(tmp_path, "f" * 64, 1 << 30)
    assert (abandoned.exists(), written.exists()) == (False, True)


def test_files_of_other_programs_in_the_folder_are_left_alone(tmp_path):
    others = [
        tmp_path / "backup" / "film.partial",
        tmp_path / "game" / "saved.state",
        tmp_path / ("e" * 32) / "a.state",
    ]
    for file in others:
        file.parent.mkdir()
        file.write_text("x" * 1000)
        os.utime(file, (0, 0))
    prefix_store.PrefixStore(tmp_path, "f" * 64, 500)
    assert all(file.exists() for file in others)


@pytest.mark.parametrize("made_by_another", ["owner", "symlink"])
def test_a_subfolder_that_another_user_could_have_made_is_rejected(made_by_another, tmp_path):
    subfolder = tmp_path / ("f" * 32)
    if made_by_another == "symlink":
        (tmp_path / "elsewhere").mkdir()
        subfolder.symlink_to(tmp_path / "elsewhere")
    else:
        subfolder.mkdir()
        if os.geteuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(subfolder, 12345, 12345)
    with pytest.raises(UserError, match=r"f{32} in it is not a folder of uid \d+"):
        prefix_store.PrefixStore(tmp_path, "f" * 64, 1 << 30)


def test_a_subfolder_that_others_could_enter_is_closed_to_them(tmp_path):
    (tmp_path / ("f" * 32)).mkdir(mode=0o755)
    assert prefix_store.PrefixStore(tmp_path, "f" * 64, 1 << 30).folder.stat().st_mode & 0o777 == 0o700


def test_a_lower_limit_takes_effect_at_the_start(tmp_path):
    store = prefix_store.PrefixStore(tmp_path, "f" * 64, 1 << 30)
    store.add([1, 2, 3], "alice", lambda name: (store.folder / name).write_bytes(b"x" * 1000) and 3)
    assert len(states(tmp_path)) == 1
    prefix_store.PrefixStore(tmp_path, "f" * 64, 500)
    assert states(tmp_path) == []


def test_states_of_which_llama_cpp_saved_different_parts_have_files_of_their_own(tmp_path):
    store = prefix_store.PrefixStore(tmp_path, "f" * 64, 1 << 30)
    for count, content in ((799, b"long"), (100, b"short")):
        store.add(CONVERSATION, "alice", lambda name, c=content, n=count: (store.folder / name).write_bytes(c) and n)
    for asked in (CONVERSATION, CONVERSATION[:100]):
        assert store.use(store.best(asked, "alice")[1])
    assert sorted(file.read_bytes() for file in states(tmp_path)) == [b"long", b"short"]


def test_a_file_in_place_of_the_folder_is_named(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--prefix-cache .*file cannot be used"):
        start(prefix_cache=tmp_path / "file")


def test_a_model_without_a_record_is_rejected_with_the_remedy(toy_gguf, tmp_path):
    with pytest.raises(UserError, match=r"is missing, so .*toy\.gguf cannot be checked"):
        LlamaCppEngine.load(toy_gguf, EngineOptions(prefix_cache=tmp_path))
