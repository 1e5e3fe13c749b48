import pytest

from entrypoints.errors import UserError
from entrypoints.settings import Secret, Settings


def test_settings_are_the_environment_and_an_empty_variable_counts_as_unset():
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"DEVICE": "", "MODEL_PATH": "/m"}) == Settings(model_path="/m")
    assert Settings.from_env({"HF_TOKEN": "hf_x", "PATH": "/bin"}).hf_token == Secret("hf_x")


def test_every_value_that_is_not_understood_is_named_with_its_variable_and_the_allowed_ones():
    with pytest.raises(UserError, match=r"LOG_FORMAT=xml, DEVICE=tpu; .*LOG_FORMAT text\|json.*DEVICE auto\|cuda"):
        Settings.from_env({"DEVICE": "tpu", "LOG_FORMAT": "xml"})


def test_a_secret_shows_in_no_text_made_of_it():
    settings = Settings.from_env({"HF_TOKEN": "hf_QuiteSecret"})
    for text in (repr(settings), str(settings), f"{settings.hf_token}", f"{settings.hf_token!r}"):
        assert "QuiteSecret" not in text
    assert settings.secrets() == ["hf_QuiteSecret"]
    assert Settings().secrets() == []
    assert not Secret()
