"""Models on packed weights against the same models as they were."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import profile

from common import inference
from common.clip import CLIP
from common.inference import BF16_PRODUCTS, optimize_for_inference, packed_is_faster
from mlip.tower import MLIPTower
from patchrank.predictor import RankPredictor
from patchrank.tower import PatchRankTower
from tests.common.towers import pictures
from waveclip import WaveTower

IDS = torch.tensor([[7, 1, 9, *[0] * 13], [7, 2, 3, 9, *[0] * 12]])


@pytest.fixture(autouse=True)
def packed_always(monkeypatch):
    """Packed weights are the faster ones, whatever this machine measures."""
    monkeypatch.setattr(inference, "packed_is_faster", lambda dtype: dtype == torch.float32)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP.tiny().eval()


def operations(call):
    """The names of the operations that a call runs without gradients."""
    with torch.no_grad(), profile() as result:
        call()
    return [event.name for event in result.events()]


def mlip_tower():
    sizes = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 32}
    return MLIPTower(**sizes, frequency_layers=1, keep_rates={2: 0.5}, guide=None).eval()


@pytest.mark.parametrize("kind", ["text", "image", "wave", "patchrank", "mlip"])
@torch.no_grad()
def test_results_are_those_of_the_plain_model(clip, kind):
    model, given = {
        "text": lambda: (clip.text_tower, IDS),
        "image": lambda: (clip.image_tower, pictures(3)),
        "wave": lambda: (WaveTower.from_image_tower(clip.image_tower, 2).eval(), pictures(3)),
        "patchrank": lambda: (
            PatchRankTower(clip.image_tower, RankPredictor.for_tower(clip.image_tower), 0.5, 1).eval(),
            pictures(3),
        ),
        "mlip": lambda: (mlip_tower(), pictures(3)),
    }[kind]()
    plain = copy.deepcopy(model)
    assert optimize_for_inference(model) is model
    torch.testing.assert_close(model(given), plain(given), atol=1e-5, rtol=0)
    maps = sum(isinstance(part, nn.Linear) for part in model.modules())
    attentions = sum(type(part).__name__ == "Attention" for part in model.modules())
    run = operations(lambda: model(given))
    assert run.count("mkldnn::_linear_pointwise") == maps + attentions
    assert "mkldnn::_linear_pointwise" not in operations(lambda: plain(given))


@torch.no_grad()
def test_levels_over_the_cache_and_an_empty_batch(clip):
    wave = WaveTower.from_image_tower(clip.image_tower, 1).eval()
    plain = copy.deepcopy(wave)
    optimize_for_inference(wave)
    for rows in (torch.tensor([2, 0]), torch.empty(0, dtype=torch.long)):
        expected, actual = (tower.refine(tower.begin(pictures(3))[1], rows)[0] for tower in (plain, wave))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


CHANGES = {
    "load_state_dict": lambda tower: tower.load_state_dict(copy.deepcopy(CLIP.tiny().image_tower.state_dict())),
    "assigned": lambda tower: tower.load_state_dict(CLIP.tiny().image_tower.state_dict(), assign=True),
    "rounded": lambda tower: tower.bfloat16().float(),
    "double": lambda tower: tower.double(),
    "in place": lambda tower: [parameter.mul_(0.5) for parameter in tower.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_packed_weights_follow_the_weights(clip, change):
    tower = optimize_for_inference(clip.image_tower)
    before = tower(pictures(2))
    CHANGES[change](tower)
    images = pictures(2).to(tower.proj.dtype)
    plain = CLIP.tiny().image_tower.to(tower.proj.dtype)
    plain.load_state_dict(tower.state_dict())
    torch.testing.assert_close(tower(images), plain(images), atol=1e-5, rtol=0)
    assert not torch.equal(tower(images).float(), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
@torch.no_grad()
def test_a_copy_stands_alone(clip, copied):
    tower = optimize_for_inference(clip.image_tower)
    before = tower(pictures(2))
    other = copied(tower)
    assert torch.equal(other(pictures(2)), before)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(tower(pictures(2)), before) and not other(pictures(2)).any()


def test_a_state_dict_and_a_file_hold_the_plain_weights(clip, tmp_path):
    state = copy.deepcopy(clip.state_dict())
    with torch.no_grad():
        optimize_for_inference(clip).encode_image(pictures(1))
    torch.testing.assert_close(clip.state_dict(), state, atol=0, rtol=0)
    clip.save(tmp_path / "clip.safetensors")
    torch.testing.assert_close(CLIP.load(tmp_path / "clip.safetensors").state_dict(), state, atol=0, rtol=0)
    buffer = io.BytesIO()
    torch.save(clip.state_dict(), buffer)
    assert len(buffer.getvalue()) < 2 * sum(4 * value.numel() for value in state.values())


def test_training_goes_on_as_before(clip):
    plain = copy.deepcopy(clip.image_tower)
    tower = optimize_for_inference(clip.image_tower).train()
    with torch.no_grad():
        tower(pictures(2))
    for model in (plain, tower):
        model(pictures(2)).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    with torch.no_grad():
        torch.testing.assert_close(tower(pictures(2)), plain(pictures(2)), atol=1e-5, rtol=0)


def test_a_second_call_changes_nothing(clip):
    tower = optimize_for_inference(clip.image_tower)
    before = [vars(part).get("forward") for part in tower.modules()]
    assert [vars(part).get("forward") for part in optimize_for_inference(tower).modules()] == before
    assert any(before)


@torch.no_grad()
def test_autocast_decides_on_the_dtype_as_on_the_plain_model(clip):
    plain = copy.deepcopy(clip.image_tower)
    tower = optimize_for_inference(clip.image_tower)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tower(pictures(2)), plain(pictures(2)))


def test_where_the_plain_product_is_faster_nothing_changes(clip, monkeypatch):
    monkeypatch.setattr(inference, "packed_is_faster", lambda dtype: False)
    optimize_for_inference(clip)
    assert not any("forward" in vars(part) or "project" in vars(part) for part in clip.modules())


def test_the_measurement_draws_nothing_and_answers_once():
    state = torch.get_rng_state()
    answers = {packed_is_faster(torch.float32) for _ in range(3)}
    assert len(answers) == 1 and torch.equal(torch.get_rng_state(), state)
    assert not packed_is_faster(torch.float64)
    assert BF16_PRODUCTS or not packed_is_faster(torch.bfloat16)


@torch.no_grad()
def test_a_dtype_that_this_processor_does_not_multiply_in_runs_as_before(clip, monkeypatch):
    monkeypatch.setattr(inference, "_DTYPES", (torch.float32,))
    tower = optimize_for_inference(clip.image_tower).bfloat16()
    assert "mkldnn::_linear_pointwise" not in operations(lambda: tower(pictures(1).bfloat16()))


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'gpu': no GPU is found here; give --device cpu"):
        inference.chosen_device("gpu")
