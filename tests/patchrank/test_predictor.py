"""The predictor's size and cost as stated, its pooling against torch's, and the files it comes from."""

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from common.flops import count_macs
from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from patchrank.predictor import RankPredictor, load_predictor, save_predictor
from patchrank.tower import PatchRankTower


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return CLIP.tiny().image_tower


def test_parameters_and_multiply_adds_at_vit_b_16():
    predictor = RankPredictor()
    macs = count_macs(predictor, torch.zeros(1, 197, 768))
    tokens, channels = 197, 64
    mixing = 2 * channels * tokens * 32 + 2 * tokens * channels * 256
    norms = 2 * 5 * tokens * channels
    assert macs.params == 46_246
    assert round(macs.gmacs * 1e9) == mixing + norms + 196 * channels
    assert 7.0e-3 < macs.gmacs < 7.5e-3
    assert predictor.macs == mixing + norms + 196 * channels


@pytest.mark.parametrize(("width", "tokens", "channels"), [(768, 197, 64), (128, 37, 64), (64, 17, 64), (96, 65, 48)])
@torch.no_grad()
def test_channels_are_averaged_as_adaptive_pooling_does(width, tokens, channels):
    predictor, x = RankPredictor(width, tokens), torch.randn(2, tokens, width)
    pooled = F.adaptive_avg_pool1d(x, channels)
    expected = predictor.head(predictor.mixer(pooled))[:, 1:, 0]
    torch.testing.assert_close(predictor(x), expected)


@torch.no_grad()
def test_the_class_token_takes_part_in_the_mixing():
    predictor, x = RankPredictor(64, 17), torch.randn(1, 17, 64)
    other = torch.cat([torch.randn(1, 1, 64), x[:, 1:]], dim=1)
    assert not torch.isclose(predictor(x), predictor(other)).all()


@torch.no_grad()
def test_tokens_do_not_tie_in_half_precision():
    """The scores of an early predictor differ little: in bf16 many would be one, and the picture's first rows stay."""
    torch.manual_seed(0)
    predictor, x = RankPredictor(64, 197), torch.randn(2, 197, 64)
    predictor.head.bias.fill_(4.0)  # what all scores share takes most of bf16's eight bits
    exact = predictor(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = predictor(x)
    half = predictor.bfloat16()(x.bfloat16())
    for scores in (mixed, half):
        assert scores.dtype == torch.float32
        for row, known in zip(scores, exact, strict=True):
            assert len(row.unique()) > 190
            assert torch.corrcoef(torch.stack([row, known]))[0, 1] > 0.9


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(16, 64\) tokens given to a predictor for \(17, 64\)"):
        RankPredictor(64, 17)(torch.zeros(1, 16, 64))


def test_a_predictor_comes_out_of_a_towers_file_and_a_training_checkpoint(tower, tmp_path):
    predictor = RankPredictor.for_tower(tower)
    PatchRankTower(tower, predictor, 0.5, 1).save(tmp_path / "tower.safetensors", CLIP.tiny().architecture)
    state = {f"predictor.{key}": value for key, value in predictor.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"prune_layer": 1}}, tmp_path / "training.ckpt")
    save_predictor(predictor, tmp_path / "alone.safetensors", 1, torch.float32)
    for file in ("tower.safetensors", "training.ckpt", "alone.safetensors"):
        loaded = load_predictor(tmp_path / file, tower, prune_layer=1)
        for key, value in predictor.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), (file, key)
        with pytest.raises(ValueError, match="reads the tokens before block 1; pruning before block 0"):
            load_predictor(tmp_path / file, tower, prune_layer=0)


def test_files_without_a_fitting_predictor_are_refused(tower, tmp_path):
    CLIP.tiny().save(tmp_path / "clip.safetensors")
    state = {f"predictor.{key}": value for key, value in RankPredictor(64, 26).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"prune_layer": 1}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": tower}, tmp_path / "code.ckpt")
    cases = {
        "none.ckpt": "no file at",
        "none.safetensors": "no weights at",
        "clip.safetensors": "holds no predictor; train one",
        "empty.ckpt": "holds no predictor; train one",
        "other.ckpt": "is of another image tower",
        "code.ckpt": "could run code",
    }
    for file, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_predictor(tmp_path / file, tower, prune_layer=1)


@torch.no_grad()
def test_on_the_list_it_prunes_as_its_own_tower_does(tower):
    predictor, images = RankPredictor.for_tower(tower), torch.randn(2, 3, 32, 32)
    setting = setting_for(tower, 0.5, 1)._replace(trained=predictor)
    listed = ReducedTower(tower, named("patch-ranking").reducers(setting))
    torch.testing.assert_close(listed(images), PatchRankTower(tower, predictor, 0.5, 1)(images))
