"""Settings from environment variables and secret files."""

from dataclasses import fields

import pytest

from entrypoints.errors import UserError
from entrypoints.settings import Secret, Settings


def test_settings_are_read_from_the_environment_and_an_empty_variable_counts_as_unset():
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"DEVICE": "", "MODEL_PATH": "/m"}) == Settings(model_path="/m")
    assert Settings.from_env({"HF_TOKEN": "hf_x", "PATH": "/bin"}).hf_token == Secret("hf_x")


def test_every_invalid_value_is_reported_with_its_variable_and_the_allowed_values():
    with pytest.raises(UserError, match=r"LOG_FORMAT=xml, DEVICE=tpu; .*LOG_FORMAT text\|json.*DEVICE auto\|cuda"):
        Settings.from_env({"DEVICE": "tpu", "LOG_FORMAT": "xml"})


def test_a_secret_is_not_part_of_any_text_representation():
    settings = Settings.from_env({"HF_TOKEN": "hf_QuiteSecret"})
    for text in (repr(settings), str(settings), f"{settings.hf_token}", f"{settings.hf_token!r}"):
        assert "QuiteSecret" not in text
    assert settings.secrets() == ["hf_QuiteSecret"]
    assert Settings().secrets() == []
    assert not Secret()


def test_a_secret_can_be_in_a_file_and_an_empty_file_counts_as_unset(tmp_path):
    (tmp_path / "key").write_text("glm-opensesame\n", encoding="utf-8")
    settings = Settings.from_env({"API_KEY_FILE": str(tmp_path / "key"), "HF_TOKEN_FILE": "/dev/null"})
    assert (settings.api_key, settings.hf_token) == (Secret("glm-opensesame"), Secret())
    assert Settings.from_env({"API_KEY_FILE": str(tmp_path / "key"), "API_KEY": "other"}).api_key == Secret("other")


def test_a_secret_file_may_start_with_a_byte_order_mark(tmp_path):
    """Notepad of Windows writes one."""
    (tmp_path / "key").write_text("glm-opensesame\r\n", encoding="utf-8-sig")
    assert Settings.from_env({"API_KEY_FILE": str(tmp_path / "key")}).api_key == Secret("glm-opensesame")


def test_a_secret_file_that_cannot_be_read_is_reported_with_its_variable(tmp_path):
    with pytest.raises(UserError, match=r"PAGE_PASSWORD_FILE=.*/absent cannot be read .*name a readable text file"):
        Settings.from_env({"PAGE_PASSWORD_FILE": str(tmp_path / "absent")})


def test_every_setting_has_a_description():
    """The command reference is generated from them."""
    assert [f.name for f in fields(Settings) if not f.metadata["description"]] == []
