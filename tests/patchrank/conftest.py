"""The trainings of this package on the tiny CLIP."""

import pytest
import torch

from common.clip import CLIP
from common.testing import tiny_architecture
from patchrank import PromptTuning, RankPredictorTraining


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Arguments that name the tiny CLIP with stored weights; rankings are kept in the test's folder."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    torch.manual_seed(0)
    CLIP.tiny().save(tmp_path / "clip.safetensors")
    return {"architecture": tiny_architecture(tmp_path), "weights": str(tmp_path / "clip.safetensors")}


@pytest.fixture
def predictor(start):
    """Makes the module of a predictor's training on the tiny tower."""
    return lambda **options: RankPredictorTraining(
        **start | {"prune_layer": 1, "keep": 0.5, "warmup_steps": 1, "learning_rate": 1e-2} | options
    )


@pytest.fixture
def tuning(start, predictor, tmp_path):
    """Makes the module of a prompt tuning that prunes by a stored predictor."""
    ranks = predictor()
    tower, clip = ranks.deployable()
    tower.save(tmp_path / "tower.safetensors", clip.architecture)
    given = {"predictor": str(tmp_path / "tower.safetensors"), "keep": 0.5, "prune_layer": 1, "depth": 2}
    return lambda **options: PromptTuning(**start, **given | {"warmup_steps": 1, "learning_rate": 0.05} | options)
