"""What MODEL of `glm prepare` means. Folders of --look-in are tested in test_model_store.py."""

import pytest

from entrypoints.errors import UserError
from entrypoints.hub.download import KNOWN_MODELS
from entrypoints.hub.model_lookup import find_model


def test_the_path_of_a_missing_folder_is_not_taken_for_a_name_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("models/mine", []) == ("models/mine", None)
    (tmp_path / "models").mkdir()
    expected = "model 'models/mine' not found: models is a folder here, and has no mine; check the path; to download it"
    with pytest.raises(UserError, match=expected):
        find_model("models/mine", [tmp_path / "store"])
    (tmp_path / "models" / "mine").mkdir()
    assert find_model("models/mine", []) == ("mine", tmp_path / "models" / "mine")


@pytest.mark.parametrize("path", ["./mine", "../mine", "./models/mine", "/models/mine"])
def test_a_path_that_starts_with_a_dot_or_a_slash_is_never_a_name_on_a_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not found: it is not a folder"):
        find_model(path, [])


def test_a_known_model_is_one_of_a_hub_even_beside_a_folder_with_the_name_of_its_organization(tmp_path, monkeypatch):
    """As a clone of another model of this organization leaves it."""
    monkeypatch.chdir(tmp_path)
    for name in ("THUDM/chatglm3-6b", "zai-org/chatglm3-6b"):
        (tmp_path / name).parent.mkdir()
        assert find_model(name, []) == (name, None)
    assert "THUDM/chatglm3-6b" in KNOWN_MODELS
