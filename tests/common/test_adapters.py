"""Towers of other libraries: equal to the originals, and the same to every reducer, ranking and counter."""

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch.nn import functional as F

from common.adapters import AdaptedTower, adapt
from common.clip import CLIP
from common.flops import count_macs
from common.reduction import ReducedTower
from mlip.merging import Merging
from patchrank.golden import golden_ranking
from patchrank.predictor import RankPredictor
from patchrank.reducers import ClassAttention, EViT, GoldenOracle, RandomKeep, ToMe
from patchrank.tower import PatchRankTower
from tests.common.foreign import FAMILIES, OPEN_CLIP, TIMM, foreign, once, twice

WITHOUT_CLASS_ATTENTION = {"gap", "ViTamin", "relative table, shared"}
WITHOUT_CLASS_TOKEN = {"SigLIP", "registers alone", *WITHOUT_CLASS_ATTENTION}
POSITIONAL = {"relative positions", "relative table, shared", "EVA02", "PE"}
each_family = pytest.mark.parametrize("name", FAMILIES)


def pictures(tower, count=2):
    generator = torch.Generator().manual_seed(1)
    size = tower.image_size
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


@each_family
@torch.no_grad()
def test_without_reducers_it_equals_the_original(name):
    original = foreign(name)
    tower = adapt(original)
    images, z = pictures(tower), original(pictures(tower))
    assert z.shape == (2, tower.embed_dim) and tower.positional == (name in POSITIONAL)
    torch.testing.assert_close(tower(images), z, atol=1e-10, rtol=0)
    torch.testing.assert_close(ReducedTower(tower, {})(images), z, atol=1e-10, rtol=0)


@each_family
@torch.no_grad()
def test_intermediates_are_what_hooks_on_the_originals_blocks_see(name):
    original = foreign(name)
    tower, seen = adapt(original), []
    trunk = getattr(original, "trunk", original)
    for block in trunk.transformer.resblocks if hasattr(trunk, "transformer") else trunk.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    images = pictures(tower)
    original(images)
    for layer, output in zip([2, 0], tower.intermediates(images, [-1, 0]), strict=True):
        classes = [] if output.class_token is None else [output.class_token]
        assert output.patches.shape[1] == 16 and bool(classes) == (name not in WITHOUT_CLASS_TOKEN)
        torch.testing.assert_close(output.patches, seen[layer][:, tower.leading :], atol=1e-10, rtol=0)
        for token in classes:
            torch.testing.assert_close(token, seen[layer][:, 0], atol=1e-10, rtol=0)
        assert (output.class_attention is None) == (name in WITHOUT_CLASS_ATTENTION)
        if output.class_attention is not None:
            torch.testing.assert_close(output.class_attention.sum(-1), torch.ones(()).double().expand(2, 2))


def test_jit_script_is_refused_with_the_mend():
    with pytest.raises(NotImplementedError, match=r"use torch\.export\.export, or torch\.jit\.trace"):
        torch.jit.script(adapt(foreign("SigLIP")))


@each_family
@torch.no_grad()
def test_the_order_of_patches_means_nothing_since_positions_go_with_them(name):
    tower = adapt(foreign(name))

    def reverse(x, context):
        return context.select(x, torch.arange(16).flip(0).expand(len(x), -1))

    for place in (1, (1, "middle")):
        reduced = ReducedTower(tower, {place: reverse})
        torch.testing.assert_close(reduced(pictures(tower)), tower(pictures(tower)), atol=1e-10, rtol=0)


@each_family
@torch.no_grad()
def test_a_token_with_the_size_of_two_counts_as_two_equal_ones(name):
    """In later attention and in every pooling; the two stand at one place."""
    tower = adapt(foreign(name))
    two, one = (ReducedTower(tower, {1: reducer})(pictures(tower)) for reducer in (twice, once))
    torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


@each_family
def test_every_reducer_runs_or_says_why_not(name):
    tower = adapt(foreign(name))
    images = pictures(tower)
    order = golden_ranking(tower, images, prune_layer=1).order
    free = {1: RandomKeep(0.5)}, {(0, "middle"): ToMe(3), (1, "middle"): ToMe(3)}, {1: GoldenOracle(0.5, order)}
    led = {1: ClassAttention(0.5)}, {(0, "middle"): EViT(0.5)}, {(1, "middle"): EViT(0.5, fuse=False)}
    led += ({(1, "middle"): Merging(0.5, proportional=True)},)
    for reducers in free:
        x, _ = ReducedTower(tower, reducers).run(images)
        assert x.shape[1] in (tower.leading + 8, tower.leading + 10)
        assert ReducedTower(tower, reducers)(images).isfinite().all()
    for reducers in led:
        if name in WITHOUT_CLASS_ATTENTION:
            with pytest.raises(ValueError, match="pools by the mean and has no class token"):
                ReducedTower(tower, reducers)(images)
        else:
            assert ReducedTower(tower, reducers)(images).isfinite().all()


@each_family
@torch.no_grad()
def test_class_attention_is_the_row_of_the_class_token_or_of_the_pooling_query(name):
    tower, seen, whole = adapt(foreign(name)), [], []
    if name in WITHOUT_CLASS_ATTENTION:
        with pytest.raises(ValueError, match="no class attention"):
            ReducedTower(tower, {1: ClassAttention(0.5)})(pictures(tower))
        return

    def look(x, context):
        seen.append(context.class_attention())
        whole.append(context.attention().mean(1)[:, 0, tower.leading :])
        return x, context

    ReducedTower(tower, {1: look})(pictures(tower))
    ReducedTower(tower, {(1, "middle"): look})(pictures(tower))
    x, block = tower.run_blocks(tower.embed(pictures(tower)), stop=1), tower.transformer.resblocks[1]
    pooled = name in WITHOUT_CLASS_TOKEN
    if pooled:
        pool = tower.source.attn_pool
        query = pool.q(pool.latent[0]).unflatten(-1, (2, 16)).transpose(0, 1)
        key = pool.kv(tower.source.norm(x))[..., :32].unflatten(-1, (2, 16)).transpose(1, 2)
        logits = query @ key.transpose(-1, -2) / 4
    else:
        query, key, _ = block.project(x)
        logits = query[:, :, :1] @ key.transpose(-1, -2) / 4
        if name == "relative positions":
            logits = logits + block.relative.get_bias()[:, :, :1]
    expected = logits.softmax(-1)[:, :, 0, tower.leading :].mean(1)
    torch.testing.assert_close(seen, [expected, expected])
    if not pooled:  # whose pooling query is no row of the block's attention
        torch.testing.assert_close(whole, [expected, expected])


@torch.no_grad()
def test_logits_of_a_pooling_query_hold_the_keys_bias():
    """Their readers, such as GlobalCom², take no softmax, which would ignore it."""
    tower, seen = adapt(foreign("SigLIP")), []
    pool = tower.source.attn_pool
    pool.kv.bias.copy_(torch.linspace(-3, 3, 64))

    def look(x, context):
        seen.append(context.class_logits())
        return x, context

    ReducedTower(tower, {1: look})(pictures(tower))
    x = tower.run_blocks(tower.embed(pictures(tower)), stop=1)
    query = pool.q(pool.latent[0]).unflatten(-1, (2, 16)).transpose(0, 1)
    key = pool.kv(tower.source.norm(x))[..., :32].unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(seen, [(query @ key.transpose(-1, -2)).squeeze(2) / 4])


@each_family
@torch.no_grad()
def test_a_golden_ranking_equals_removing_windows_one_by_one(name):
    tower = adapt(foreign(name))
    image, scores = pictures(tower, 1), torch.zeros(16, dtype=torch.float64)
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        window = [4 * r + c for r in (row, row + 1) for c in (column, column + 1)]
        kept = torch.tensor([[place for place in range(16) if place not in window]])
        pruned = ReducedTower(tower, {1: lambda x, context, kept=kept: context.select(x, kept)})
        scores[window] = 1 - F.cosine_similarity(pruned(image), tower(image))
    ranking = golden_ranking(tower, image, prune_layer=1, block=2, stride=2)
    torch.testing.assert_close(ranking.scores[0], scores, atol=1e-10, rtol=0)
    last = golden_ranking(tower, image, prune_layer=2, block=2, stride=2)
    assert sorted(last.order[0].tolist()) == list(range(16))


@pytest.mark.parametrize("name", sorted(POSITIONAL))
@torch.no_grad()
def test_merged_tokens_stand_at_the_mean_of_their_patches(name):
    """So the mean over all patches, weighted by size, stays the middle of the grid."""
    tower = adapt(foreign(name))
    reducers = [{(0, "middle"): ToMe(4), (1, "middle"): ToMe(4)}]
    if name not in WITHOUT_CLASS_ATTENTION:
        reducers.append({(1, "middle"): Merging(0.6)})
    for places in reducers:
        _, context = ReducedTower(tower, places).run(pictures(tower))
        assert context.sizes.max() > 1 and context.places.min() >= 0 and context.places.max() < 16
        middle = (context.centres * context.sizes[..., None]).sum(1) / 16
        torch.testing.assert_close(middle, torch.full((2, 2), 1.5, dtype=torch.float64))


@torch.no_grad()
def test_a_fused_token_stands_between_the_dropped_ones():
    tower = adapt(foreign("PE"))
    _, context = ReducedTower(tower, {(1, "middle"): EViT(0.85)}).run(pictures(tower))
    kept = context.centres[:, :-1]
    dropped = torch.full((2, 2), 16 * 1.5, dtype=torch.float64) - kept.sum(1)  # 14 of 16 stay
    assert context.centres.shape == (2, 15, 2) and (context.centres[:, -1] <= dropped).all()


@each_family
def test_gradients_reach_every_weight_of_the_original(name):
    original = foreign(name).train()
    tower = ReducedTower(adapt(original), {1: RandomKeep(0.5)})
    tower(pictures(tower.tower)).square().sum().backward()
    unused = {"trunk.attn_pool.q_norm.weight"}
    for key, parameter in original.named_parameters():
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) or key in unused, key


@each_family
def test_it_costs_what_the_original_costs(name):
    original = foreign(name).float()
    tower = adapt(original)
    image = torch.zeros(1, 3, tower.image_size, tower.image_size)
    ours, theirs = count_macs(tower, image), count_macs(original, image)
    assert (ours.gmacs, ours.gmacs_paper, ours.params) == (theirs.gmacs, theirs.gmacs_paper, theirs.params)


def block_macs(tokens, width, hidden, maps=2):
    """A block's products and norms: ``maps`` linear maps to the hidden layer and back, in all."""
    products = (4 * width**2 + maps * width * hidden) * tokens + 2 * width * tokens**2
    return products + 2 * 5 * width * tokens


def test_siglip_costs_a_closed_formula():
    width, tokens, depth = 32, 16, 3
    embed = 3 * 8 * 8 * width * tokens
    norm = 5 * width
    query = width**2 + 2 * width**2 * tokens + 2 * width * tokens + width**2
    pool = norm * tokens + query + norm + 2 * width * 4 * width + width * 16
    expected = embed + depth * block_macs(tokens, width, 4 * width) + pool
    assert round(1e9 * count_macs(adapt(foreign("SigLIP").float()), torch.zeros(1, 3, 32, 32)).gmacs) == expected


def test_eva02_costs_a_closed_formula():
    width, tokens, depth, hidden = 32, 17, 3, int(32 * 8 / 3)
    block = block_macs(tokens, width, hidden, maps=3) + 5 * width * tokens + 5 * hidden * tokens  # two inner norms
    expected = 3 * 8 * 8 * width * 16 + depth * block + 5 * width * tokens + width * 16
    assert round(1e9 * count_macs(adapt(foreign("EVA02").float()), torch.zeros(1, 3, 32, 32)).gmacs) == expected


@pytest.mark.parametrize("name", ["registers", "SigLIP", "PE"])
@torch.no_grad()
def test_a_rank_predictor_fits_any_leading_tokens(name):
    tower = adapt(foreign(name).float())
    predictor = RankPredictor.for_tower(tower)
    pruned = PatchRankTower(tower, predictor, keep=0.5, prune_layer=1).eval()
    images = pictures(tower).float()
    assert pruned.run(images)[0].shape == (2, tower.leading + 8, 32)
    torch.testing.assert_close(pruned.at(1.0)(images), tower(images))
    with pytest.raises(ValueError, match="save_predictor"):
        pruned.save("nowhere.safetensors", {})


def test_a_clip_of_this_suite_gives_its_own_tower():
    clip = CLIP.tiny()
    assert adapt(clip) is clip.image_tower and adapt(clip.image_tower) is clip.image_tower


@torch.no_grad()
def test_an_open_clip_model_gives_its_image_tower():
    model = open_clip.create_model("ViT-S-32-alt").eval()
    tower = adapt(model)
    images = torch.randn(1, 3, 224, 224)
    assert isinstance(tower, AdaptedTower) and tower.patch_size == 32
    torch.testing.assert_close(tower(images), model.encode_image(images), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a tower for 224; resize them"):
        tower(torch.zeros(1, 3, 256, 256))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ModifiedResNet((1, 1, 1, 1), 16, 2, image_size=32, width=8), "a ResNet is convolutional"),
        (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), "a ConvNeXt is convolutional"),
        (
            lambda: FastVit(layers=(1, 1), embed_dims=(8, 8), mlp_ratios=(1, 1), token_mixers=("repmixer",) * 2),
            "FastViT",
        ),
        (
            lambda: SwinTransformer(img_size=32, embed_dim=8, depths=(1,), num_heads=(1,), window_size=2),
            "a Swin attends",
        ),
    ],
)
def test_an_architecture_without_patch_tokens_is_refused_by_name(build, words):
    with pytest.raises(ValueError, match=f"no sequence of patch tokens.*{words}.*choose a ViT"):
        adapt(build())


def test_parts_that_are_not_adapted_are_named():
    for arguments, words in (
        ({"global_pool": "avgmax"}, "global_pool 'avgmax'"),
        ({"block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"img_size": (32, 64)}, "both must be square"),
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate 0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            adapt(TimmVisionTransformer(**{**TIMM, **arguments}))
    with pytest.raises(ValueError, match="unfinished"):
        adapt(VisionTransformer(**OPEN_CLIP, attentional_pool="parallel", attn_pooler_heads=2))
