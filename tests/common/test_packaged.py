"""The model that is there without a download: found by entry points, and missed in one sentence."""

from types import SimpleNamespace

import pytest

from common import packaged
from common.deploy import load
from common.packaged import PackagedModel, default_model, packaged_model


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Two packages that bring a model each."""
    models = {
        name: PackagedModel(tmp_path / f"{name}.safetensors", tmp_path / "clip.safetensors", ["cat"], ["{}"], name)
        for name in ("late", "early")
    }
    points = [SimpleNamespace(name=name, load=lambda model=model: lambda: model) for name, model in models.items()]
    monkeypatch.setattr(packaged, "entry_points", lambda group: points)
    return models


def test_the_first_by_name_is_the_default(two):
    assert default_model() is two["early"]


def test_a_model_is_known_by_its_weights_file(two, tmp_path):
    assert packaged_model(tmp_path / "x" / ".." / "late.safetensors") is two["late"]
    assert packaged_model(tmp_path / "other.safetensors") is None


def test_the_suite_brings_one_of_its_own():
    model = default_model()
    assert model.weights.is_file() and model.texts.is_file()
    assert f"{len(model.class_names):,} emoji" in model.about


def test_without_any_the_user_is_asked_to_name_one(monkeypatch):
    monkeypatch.setattr(packaged, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match=r"no installed package brings a model .*; name one with --model, or install"):
        load()
