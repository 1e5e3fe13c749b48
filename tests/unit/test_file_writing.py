"""Files that appear when they are complete, and JSON for people."""

import pytest

from entrypoints.file_writing import indented_json, replace_text, replaced_file


def test_a_link_beside_a_small_file_is_not_written_through(tmp_path):
    other, file = tmp_path / "other", tmp_path / "finished.json"
    other.write_text("other")
    (tmp_path / ".finished.json.partial").symlink_to(other)
    replace_text(file, "你好\n")
    replace_text(file, "再见\n")
    assert (file.read_text(encoding="utf-8"), other.read_text()) == ("再见\n", "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished.json", "other"]


def test_after_an_error_the_older_file_is_left_and_nothing_else(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("old")

    def write_half():
        with replaced_file(file) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("rows.jsonl", "old")]


def test_json_for_people_has_lines_and_plain_characters():
    assert indented_json({"回答": [1]}) == '{\n  "回答": [\n    1\n  ]\n}'
