"""Level by level over the cache against one masked pass, and what may and may not depend on the details."""

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from common.flops import count_macs
from waveclip import WaveTower


def tower(levels=1, **options):
    """A tower on CLIP.tiny() (32 px, patch 8) and three pictures."""
    torch.manual_seed(0)
    wave = WaveTower.from_image_tower(CLIP.tiny().image_tower, levels, **options)
    with torch.no_grad():
        wave.tokenizer.class_tokens.add_(0.1 * torch.randn_like(wave.tokenizer.class_tokens))
    return wave, torch.randn(3, 3, 32, 32)


def cached(wave, images):
    """All embeddings, one refinement after the other."""
    z, state = wave.begin(images)
    levels = [z]
    for _ in range(wave.steps - 1):
        z, state = wave.refine(state)
        levels.append(z)
    return levels


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_refining_equals_one_masked_pass(levels, dtype, tolerance):
    wave, images = tower(levels)
    wave, images = wave.to(dtype), images.to(dtype)
    actual, expected = cached(wave, images), wave(images)
    assert len(actual) == len(expected) == levels + 1
    for z, masked in zip(actual, expected, strict=True):
        torch.testing.assert_close(z, masked, atol=tolerance, rtol=0)


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_refining_in_bf16_points_where_the_masked_pass_does(levels):
    wave, images = tower(levels)
    wave, images = wave.bfloat16(), images.bfloat16()
    for z, masked in zip(cached(wave, images), wave(images), strict=True):
        assert z.dtype == torch.bfloat16
        assert F.cosine_similarity(z.float(), masked.float(), dim=-1).min() > 0.999


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_other_details_change_the_fine_embeddings_alone(levels, monkeypatch):
    wave, images = tower(levels)
    coarse, *details = wave.tokenizer.decompose(images)
    before, before_cached = wave(images), cached(wave, images)
    others = [torch.randn_like(band) for band in details]
    monkeypatch.setattr(wave.tokenizer, "decompose", lambda images: [coarse, *others])
    for old, new in ((before, wave(images)), (before_cached, cached(wave, images))):
        assert torch.equal(old[0], new[0])
        assert not torch.isclose(old[1], new[1]).all()


@torch.no_grad()
def test_the_finest_details_change_the_last_embedding_alone(monkeypatch):
    wave, images = tower(levels=2)
    *bands, finest = wave.tokenizer.decompose(images)
    before = wave(images)
    monkeypatch.setattr(wave.tokenizer, "decompose", lambda images: [*bands, torch.randn_like(finest)])
    assert [torch.equal(*pair) for pair in zip(before, wave(images), strict=True)] == [True, True, False]


def test_the_coarse_embedding_has_no_gradient_in_the_details(monkeypatch):
    wave, images = tower()
    bands = [band.detach().requires_grad_() for band in wave.tokenizer.decompose(images)]
    monkeypatch.setattr(wave.tokenizer, "decompose", lambda images: bands)
    first, last = wave(images)
    coarse, details = torch.autograd.grad(first.square().sum(), bands, retain_graph=True)
    assert coarse.abs().sum() > 0 and torch.equal(details, torch.zeros_like(details))
    coarse, details = torch.autograd.grad(last.square().sum(), bands)
    assert coarse.abs().sum() > 0 and details.abs().sum() > 0


@torch.no_grad()
def test_chosen_rows_go_on_and_are_chosen_again():
    wave, images = tower(levels=2)
    wave, images = wave.double(), images.double()
    expected = wave(images)
    _, state = wave.begin(images)
    z, state = wave.refine(state, torch.tensor([2, 0]))
    torch.testing.assert_close(z, expected[1][[2, 0]], atol=1e-10, rtol=0)
    z, state = wave.refine(state, torch.tensor([1]))  # of the rows that went on: picture 0
    torch.testing.assert_close(z, expected[2][[0]], atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_state_can_be_refined_again():
    wave, images = tower(levels=2)
    _, state = wave.begin(images)
    first, refined = wave.refine(state)
    wave.refine(refined, torch.tensor([1]))
    second, _ = wave.refine(state)
    assert torch.equal(first, second)


@torch.no_grad()
def test_past_the_last_level_there_is_nothing_to_refine():
    wave, images = tower()
    _, state = wave.begin(images)
    _, state = wave.refine(state)
    with pytest.raises(ValueError, match="all 2 levels of this state are done"):
        wave.refine(state)


@torch.no_grad()
def test_encode_image_is_the_last_level():
    wave, images = tower(levels=2)
    last = wave(images)[-1]
    torch.testing.assert_close(wave.encode_image(images, normalize=False), last, atol=1e-5, rtol=0)
    torch.testing.assert_close(wave.encode_image(images), F.normalize(last, dim=-1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_teacher_is_copied_not_shared():
    teacher = CLIP.tiny().image_tower
    wave = WaveTower.from_image_tower(teacher)
    parameters = {parameter.data_ptr() for parameter in wave.parameters()}
    assert parameters.isdisjoint(parameter.data_ptr() for parameter in teacher.parameters())
    for key, value in teacher.transformer.state_dict().items():
        assert torch.equal(wave.transformer.state_dict()[key], value)


@pytest.mark.parametrize("start", ["teacher", "random"])
def test_it_is_on_its_towers_device_and_in_its_dtype(start):
    of = CLIP.tiny().image_tower.to(torch.bfloat16)
    wave = WaveTower.from_image_tower(of, start=start)
    assert {parameter.dtype for parameter in wave.parameters()} == {torch.bfloat16}
    assert {z.dtype for z in wave(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))} == {torch.bfloat16}
    elsewhere = WaveTower.from_image_tower(of.to("meta"), start=start)
    assert {part.device.type for part in (*elsewhere.parameters(), *elsewhere.buffers())} == {"meta"}


def test_the_class_token_can_be_one_for_all_levels():
    for shared, vectors in ((False, 3), (True, 1)):
        wave, images = tower(levels=2, shared_class_token=shared)
        assert wave.tokenizer.class_tokens.shape == (vectors, 64)
        with torch.no_grad():
            bands = wave.tokenizer.decompose(images)
            starts = torch.stack([wave.tokenizer.embed(band, step)[0, 0] for step, band in enumerate(bands)])
        assert len(starts.unique(dim=0)) == vectors


@pytest.mark.parametrize(
    "options", [{"levels": 2}, {"wavelet": "db2"}, {"shared_class_token": True}], ids=lambda o: next(iter(o))
)
@torch.no_grad()
def test_a_saved_tower_comes_back(tmp_path, options):
    wave, images = tower(**options)
    wave.save(tmp_path / "wave.safetensors", CLIP.tiny().architecture)
    again = WaveTower.load(tmp_path / "wave.safetensors")
    for actual, expected in zip(again(images), wave(images), strict=True):
        assert torch.equal(actual, expected)


def test_a_file_of_another_model_is_refused(tmp_path):
    CLIP.tiny().save(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="does not describe a WaveTower"):
        WaveTower.load(tmp_path / "clip.safetensors")


def test_a_file_whose_weights_are_not_what_it_describes_is_refused(tmp_path):
    wave, _ = tower()
    wave.save(tmp_path / "wave.safetensors", {**CLIP.tiny().architecture, "embed_dim": 16})
    with pytest.raises(
        ValueError, match=r"wave.safetensors does not fit .* proj has shape \(64, 32\), expected \(64, 16\)"
    ):
        WaveTower.load(tmp_path / "wave.safetensors")


def test_attention_is_paid_for_new_tokens_alone():
    class Refined(torch.nn.Module):
        def __init__(self, wave):
            super().__init__()
            self.wave = wave

        def forward(self, images):
            return self.wave.encode_image(images)

    wave, images = tower(levels=1)
    coarse, fine, layers, width = 5, 13, 2, 64
    assert [wave.tokens_in(step) for step in range(2)] == [coarse, fine]
    cost, masked = count_macs(Refined(wave), images[:1]), count_macs(wave, images[:1])
    products = 2 * width * layers * (coarse**2 + fine * (coarse + fine))
    for counted in (cost, masked):  # nor does one pass form the products that the mask of equation 1 would hide
        assert round((counted.gmacs - counted.gmacs_paper) * 1e9) == products
