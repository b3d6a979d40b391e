"""WaveTowers that start from other libraries' towers."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from common.adapters import adapt
from common.tower import ImageTower
from patchrank.reducers import ClassAttention, ToMe
from tests.common.foreign import FAMILIES, OPEN_CLIP, foreign
from waveclip import AdaptedWaveTower, WaveTower
from waveclip.growing import adopt_levels
from waveclip.reduced import ReducedWaveTower

FIT = [
    "CLIP", "CLIP with layer scale", "CLIP with custom blocks", "CLIPA", "CLIP, mean of normed tokens", "CoCa",
    "CLIP of timm", "SigLIP", "gap", "EVA", "EVA, post-norm",
]  # fmt: skip
REFUSED = {
    "MobileCLIP-B": "HybridEmbed", "ViTamin": "HybridEmbed", "registers": "registers, 4 tokens",
    "registers alone": "registers, 3 tokens",
    "EVA02": "rotary", "PE": "rotary", "relative positions": "relative", "relative table, shared": "relative",
}  # fmt: skip


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def wave_of(name, **options):
    return AdaptedWaveTower.from_image_tower(adapt(foreign(name)), **options).double().eval()


def test_every_family_fits_or_is_refused():
    assert {*FIT, *REFUSED} == set(FAMILIES)


@pytest.mark.parametrize("name", FIT)
@torch.no_grad()
def test_the_first_level_is_the_original_on_the_halved_picture(name):
    """With every 2x2 patches' positions averaged."""
    tower, wave = adapt(foreign(name)), wave_of(name)
    weight, positions, class_token = tower.patch_map()
    x = F.conv2d(F.avg_pool2d(images(), 2), weight, stride=8).flatten(2).transpose(1, 2)
    x = x + F.avg_pool2d(positions.T.reshape(1, 32, 4, 4), 2).flatten(2)[0].T
    if class_token is not None:
        x = torch.cat([class_token.expand(2, 1, -1), x], dim=1)
    expected = tower.pool(tower.run_blocks(tower.ln_pre(x)))
    torch.testing.assert_close(wave.begin(images())[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FIT)
@torch.no_grad()
def test_level_by_level_equals_one_masked_pass(name):
    wave = wave_of(name, levels=2)
    at_once = wave(images())
    z, state = wave.begin(images())
    levels = [z]
    while state.bands:
        z, state = wave.refine(state)
        levels.append(z)
    assert len(levels) == 3 and wave.tokens_in(0) == wave.tokenizer.leading + 1
    torch.testing.assert_close(tuple(levels), at_once, atol=1e-10, rtol=0)


@torch.no_grad()
def test_it_is_on_the_originals_device_and_in_its_dtype():
    tower = adapt(foreign("SigLIP")).to(torch.bfloat16)
    wave = AdaptedWaveTower.from_image_tower(tower)
    assert {parameter.dtype for parameter in wave.parameters()} == {torch.bfloat16}
    assert {z.dtype for z in wave(images().bfloat16())} == {torch.bfloat16}
    elsewhere = AdaptedWaveTower.from_image_tower(tower.to("meta"))
    assert {part.device.type for part in (*elsewhere.parameters(), *elsewhere.buffers())} == {"meta"}


def test_it_is_the_wave_tower_of_this_suites_own_tower():
    original = foreign("CLIP")
    own = ImageTower(32, 8, 32, 3, 2, 16, mlp_ratio=2.0).double()
    own.load_state_dict(original.state_dict())
    makers = (WaveTower, own), (AdaptedWaveTower, adapt(original))
    waves = [maker.from_image_tower(tower).double().eval() for maker, tower in makers]
    waves[1].tokenizer.load_state_dict(waves[0].tokenizer.state_dict())  # band embeddings are drawn
    torch.testing.assert_close(waves[1](images()), waves[0](images()), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_tower_without_linear_patches_at_fixed_places_is_refused(name):
    with pytest.raises(ValueError, match=f"no wavelet tokens for this .*{REFUSED[name]}"):
        wave_of(name)


@pytest.mark.parametrize("name", FIT)
def test_all_that_is_trained_gets_a_gradient(name):
    wave = wave_of(name).train()
    torch.stack(wave(images())).square().sum().backward()
    for key, parameter in wave.named_parameters():
        assert parameter.grad is not None, key


@torch.no_grad()
def test_reducers_work_in_its_levels():
    wave = wave_of("SigLIP")
    reduced = ReducedWaveTower(wave, {1: {(0, "middle"): ToMe(2), (1, "middle"): ToMe(2), 2: ClassAttention(0.5)}})
    coarse, fine = reduced(images())
    torch.testing.assert_close(coarse, wave(images())[0], atol=1e-10, rtol=0)
    assert fine.shape == (2, 16) and not torch.allclose(fine, wave(images())[1])


def counted(x, context):
    """A reducer: three tokens, which count once, twice and three times."""
    x, context = context.select(x, torch.arange(3).expand(len(x), -1))
    sizes = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype).expand(len(x), -1)
    bias = F.pad(sizes.log(), (context.leading, 0))[:, None, None]
    return x, replace(context, sizes=sizes, bias=bias)


def repeated(x, context):
    """A reducer, for ``counted`` the slow way: the same tokens, as often as they count."""
    return context.select(x, torch.tensor([0, 1, 1, 2, 2, 2]).expand(len(x), -1))


@pytest.mark.parametrize("name", FIT)
@torch.no_grad()
def test_intermediates_are_the_tokens_of_the_masked_pass(name):
    """A token has seen its own level and the earlier ones; a later level's class token attends to all of them."""
    wave = wave_of(name)
    (outputs,) = wave.intermediates(images(), [-1])
    tokens = wave.run_blocks(wave.embed(images()), mask=wave.mask).split(wave.mask, dim=1)
    for step, (output, expected) in enumerate(zip(outputs, tokens, strict=True)):
        leading = wave.tokenizer.leading
        torch.testing.assert_close(output.patches, expected[:, leading:], atol=1e-10, rtol=0)
        assert (output.class_token is None) == (leading == 0)
        if leading:
            assert output.class_attention.shape[-1] == sum(wave.mask[: step + 1])
            torch.testing.assert_close(output.class_token, expected[:, 0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["CLIPA", "CLIP, mean of normed tokens", "CoCa", "gap", "SigLIP"])
@torch.no_grad()
def test_a_token_is_pooled_as_often_as_it_counts(name):
    wave = wave_of(name)
    once, often = (ReducedWaveTower(wave, {1: {(2, "after"): each}})(images())[1] for each in (counted, repeated))
    torch.testing.assert_close(once, often, atol=1e-10, rtol=0)


def test_what_only_this_suites_towers_do_is_refused(tmp_path):
    wave, small = wave_of("CLIP", levels=2), wave_of("CLIP")
    with pytest.raises(ValueError, match="use AdaptedWaveTower"):
        WaveTower.from_image_tower(adapt(foreign("CLIP")))
    with pytest.raises(ValueError, match="not saved here"):
        wave.save(tmp_path / "wave.safetensors", OPEN_CLIP)
    with pytest.raises(ValueError, match="another library's"):
        adopt_levels(wave, small)
