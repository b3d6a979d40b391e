"""MLIPTower: plain settings are CLIP's tower, and every stage does what Tables 12 and 13 and section 3.4 say."""

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP, load_architecture
from common.reduction import ReducedTower, ReductionContext, run_reduced
from common.tower import ImageTower
from mlip import PAPER_LAYERS, Guide, MLIPTower
from mlip.fourier import FourierBlock
from mlip.merging import Merging

SIZES = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 2, "embed_dim": 16}
PLAIN = {"frequency_layers": 0, "keep_rates": {}, "guide": None}


def small_guide():
    return Guide(image_size=16, patch_size=8, width=32, depth=1, heads=2)


def build(**options):
    """A small tower with every part in use, its zeros shaken; options change it."""
    torch.manual_seed(0)
    whole = {"frequency_layers": 1, "keep_rates": {3: 0.7}, "guide": small_guide()}
    tower = MLIPTower(**SIZES, **{**whole, **options}).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return tower


def pictures(count=2):
    return torch.randn(count, 3, 32, 32)


@torch.no_grad()
def test_without_frequency_and_merging_it_is_clips_tower():
    torch.manual_seed(0)
    plain, images = ImageTower(**SIZES).eval(), pictures()
    tower = MLIPTower(**SIZES, **PLAIN).eval()
    tower.vit.load_state_dict(plain.state_dict())
    assert tower.state_dict().keys() == {f"vit.{key}" for key in plain.state_dict()}
    features = tower(images)
    torch.testing.assert_close(features.spatial, plain(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(tower.encode_image(images), F.normalize(plain(images), dim=-1), atol=1e-5, rtol=0)
    assert features.frequency is None and features.frequency_tokens is None
    assert features.spatial_tokens.shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("ViT-B-32", 12, 768, 12), ("ViT-B-16", 12, 768, 12), ("ViT-L-14", 24, 1024, 16)],
)
def test_sizes_are_table_12s(name, layers, width, heads):
    with torch.device("meta"):
        tower = MLIPTower.from_architecture(load_architecture(name), guide=Guide(), **PAPER_LAYERS[name])
    blocks = tower.vit.transformer.resblocks
    assert (tower.vit.image_size, len(tower.fourier) + len(blocks)) == (224, layers)
    assert tower.vit.proj.shape == (width, 512) == tower.frequency_head[1].weight.T.shape
    assert {block.attn.heads for block in blocks} == {heads}
    assert {block.mlp.c_fc.out_features for block in (*tower.fourier, *blocks)} == {4 * width}


EMBEDDED = {"embed_dim": 128, "frequency_layers": 1, "keep_rates": {3: 0.5}}
TABLE_13 = {  # patches, Fourier blocks, and the layers from whose MLP on there are fewer patch tokens
    "ViT-B-32": (49, 4, {9: 34, 11: 23}),
    "ViT-B-16": (196, 4, {9: 98, 11: 49}),
    "ViT-L-14": (256, 8, {13: 179, 16: 125, 19: 81, 22: 52}),
    "common/embedded_clip.json": (36, 1, {3: 18}),
}


@pytest.mark.parametrize("name", TABLE_13)
@torch.no_grad()
def test_layer_by_layer_as_table_13_has_it(name):
    """Tokens that enter each half of each layer, at a small width, which they do not depend on."""
    patches, frequency, merged = TABLE_13[name]
    architecture, options = load_architecture(name), PAPER_LAYERS.get(name, EMBEDDED)
    architecture["vision_cfg"] = architecture["vision_cfg"] | {"width": 64, "head_width": 32}
    tower = MLIPTower.from_architecture(architecture, guide=small_guide(), **options).eval()
    layers = [*tower.fourier, *tower.vit.transformer.resblocks]
    assert [isinstance(block, FourierBlock) for block in layers] == [i < frequency for i in range(len(layers))]
    entered = {}

    def record(part, *place):
        def hook(part, given):
            entered.setdefault(place, given[0].shape[1])

        part.register_forward_pre_hook(hook)

    for number, block in enumerate(layers, 1):
        record(block.ln_1, number, "mix"), record(block.mlp, number, "mlp")
    for number, attention in tower.guide_attention.items():
        record(attention, int(number), "guide")
    size = architecture["vision_cfg"]["image_size"]
    features = tower(torch.zeros(1, 3, size, size))

    expected, tokens = {}, patches
    for number in range(1, len(layers) + 1):
        class_token = int(number > frequency)
        expected[number, "mix"] = tokens + class_token
        if number in merged:
            expected[number, "guide"] = tokens + 1
        tokens = merged.get(number, tokens)
        expected[number, "mlp"] = tokens + class_token
    assert entered == expected
    assert features.frequency_tokens.shape == (1, patches, options["embed_dim"])
    assert features.spatial_tokens.shape == (1, tokens, options["embed_dim"])


@torch.no_grad()
def test_each_stage_by_hand():
    tower, images = build(), pictures()
    x = tower.embed(images)
    torch.testing.assert_close(x, tower.vit.embed(images))
    mixed = tower.run_frequency(x)
    torch.testing.assert_close(mixed[:, 0], x[:, 0])
    torch.testing.assert_close(mixed[:, 1:], tower.fourier[0](x[:, 1:]))
    features = tower(images)
    torch.testing.assert_close(features.frequency_tokens, tower.frequency_head(mixed[:, 1:]))
    torch.testing.assert_close(features.frequency, features.frequency_tokens.mean(1))

    first, acceleration, last = tower.vit.transformer.resblocks  # layers 2, 3 and 4
    y = tower.guide_attention["3"](first(mixed), tower.guide(images))
    places = torch.arange(16).expand(2, -1)
    y, context = run_reduced([acceleration, last], y, ReductionContext(places), {(0, "middle"): Merging(0.7)})
    result, result_context = tower.run_blocks(mixed, tower.look(images))
    torch.testing.assert_close(result, y)
    torch.testing.assert_close(result_context.sizes, context.sizes)
    torch.testing.assert_close(features.spatial, tower.pool(y))
    torch.testing.assert_close(features.spatial_tokens, (tower.vit.ln_post(y) @ tower.vit.proj)[:, 1:])
    assert features.spatial_tokens.shape == (2, 11, 16)


@torch.no_grad()
def test_without_a_guide_acceleration_is_merging_alone():
    tower, images = build(guide=None, frequency_layers=0), pictures()
    torch.testing.assert_close(tower.encode_image(images, normalize=False), tower(images).spatial)
    reduced = ReducedTower(tower.vit, {(2, "middle"): Merging(0.7)})
    torch.testing.assert_close(tower(images).spatial, reduced(images))


@torch.no_grad()
def test_inference_gives_the_spatial_embedding_and_runs_no_head_of_a_loss():
    tower, images = build(), pictures()
    expected = tower(images).spatial
    tower.frequency_head.register_forward_pre_hook(lambda *_: pytest.fail("the frequency head ran"))
    torch.testing.assert_close(tower.encode_image(images, normalize=False), expected)
    torch.testing.assert_close(tower.encode_image(images).norm(dim=-1), torch.ones(2))


@torch.no_grad()
def test_guide_tokens_proportional_attention_and_spectrum_are_choices_that_matter():
    images, base = pictures(), build().state_dict()
    results = []
    for options in ({}, {"guide_tokens": "class"}, {"proportional_attention": True}, {"spectrum": "linear"}):
        tower = build(**options)
        tower.load_state_dict(base)
        results.append(tower.encode_image(images))
    for other in results[1:]:
        assert (other - results[0]).abs().max() > 1e-4


@pytest.mark.parametrize("learns", [False, True])
def test_every_parameter_learns_but_a_frozen_guides(learns):
    guide = Guide(image_size=16, patch_size=8, width=32, depth=1, heads=2, train=learns)
    tower = build(guide=guide, keep_rates={2: 0.7, 4: 0.5}).train()
    features = tower(pictures())
    sum((part * torch.randn_like(part)).sum() for part in features).backward()
    for name, parameter in tower.named_parameters():
        if name.startswith("guide.") and not learns:
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_a_step_in_bf16_is_finite_and_near_fp32s():
    tower, images = build().train(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(images)
    sum(part.float().square().mean() for part in features).backward()
    assert all(p.grad.isfinite().all() for p in tower.parameters() if p.grad is not None)
    exact = tower(images)
    assert (F.cosine_similarity(features.frequency.float(), exact.frequency) > 0.999).all()


def test_half_precision_weights_run():
    tower = build().bfloat16()
    with torch.no_grad():
        assert tower.encode_image(pictures().bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_layers": 4}, "frequency_layers 4 of 4 layers; use 0 to 3"),
        ({"frequency_layers": 3}, "layer 3: the Spatial Stage has layers 4 to 4"),
        ({"keep_rates": {5: 0.7}}, "layer 5: the Spatial Stage has layers 2 to 4"),
        ({"keep_rates": {3: 0.3}}, "keep rate 0.3"),
        ({"keep_rates": {}}, "acceleration blocks alone"),
        ({"guide_tokens": "some"}, "'some'"),
        ({"pieces": 3}, "pieces 3"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_rates_that_together_leave_no_token_are_refused():
    four = SIZES | {"image_size": 16}
    with pytest.raises(ValueError, match=r"keep rate 0\.5 at layer 4 leaves none of 1 tokens"):
        MLIPTower(**four, frequency_layers=1, keep_rates={2: 0.5, 3: 0.5, 4: 0.5}, guide=None)


def test_layer_numbers_may_come_from_json():
    assert build(keep_rates={"3": 0.7}).keep_rates == {3: 0.7}


def test_architectures_carry_over():
    tiny = CLIP.tiny().architecture
    tower = MLIPTower.from_architecture(tiny | {"quick_gelu": True}, **PLAIN)
    reference = CLIP(tiny | {"quick_gelu": True}).image_tower
    assert {key: value.shape for key, value in tower.vit.state_dict().items()} == {
        key: value.shape for key, value in reference.state_dict().items()
    }
    kinds = [type(block.mlp.gelu) for block in tower.vit.transformer.resblocks]
    assert kinds == [type(block.mlp.gelu) for block in reference.transformer.resblocks]
