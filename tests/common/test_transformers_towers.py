"""transformers' own CLIP and SigLIP towers, adapted: equal to the library, and the same to every reducer."""

import pytest
import torch

from common.adapters import adapt
from common.reduction import ReducedTower
from patchrank.reducers import ClassAttention, EViT, ToMe
from tests.common.foreign import once, twice

transformers = pytest.importorskip("transformers", minversion="5")
VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2,
}  # fmt: skip


def clip():
    """A whole CLIP, whose projection belongs to the tower."""
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16
    )
    return transformers.CLIPModel(config)


def siglip(**changes):
    """A SigLIP's vision tower alone."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION | changes))


@pytest.fixture(params=[clip, siglip])
def model(request):
    """A model in double precision, with every weight drawn."""
    torch.manual_seed(0)
    model = request.param().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pictures(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def embeddings(model, images):
    """What the library makes of pictures."""
    if hasattr(model, "visual_projection"):
        return model.visual_projection(model.vision_model(images).pooler_output)
    return model(images).pooler_output


@torch.no_grad()
def test_without_reducers_it_equals_the_original(model):
    tower, images = adapt(model), pictures()
    assert tower.leading == hasattr(model, "visual_projection")
    for z in (tower(images), ReducedTower(tower, {})(images)):
        assert z.shape == (2, tower.embed_dim)
        torch.testing.assert_close(z, embeddings(model, images), atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_token_with_the_size_of_two_counts_as_two_equal_ones(model):
    tower = adapt(model)
    two, one = (ReducedTower(tower, {1: reducer})(pictures()) for reducer in (twice, once))
    torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


@torch.no_grad()
def test_class_attention_is_the_librarys_own(model):
    """Of CLIP's class token in the block, or of the query in SigLIP's head."""
    tower, seen = adapt(model), []

    def look(x, context):
        seen.append((x, context.class_attention()))
        return x, context

    ReducedTower(tower, {1: look})(pictures())
    ((x, found),) = seen
    vision = getattr(model, "vision_model", model)
    if tower.leading:
        layer = vision.encoder.layers[1]
        layer.self_attn.config._attn_implementation = "eager"  # the one that gives its weights
        expected = layer.self_attn(layer.layer_norm1(x))[1][:, :, 0, 1:].mean(1)
    else:
        head, normed = vision.head, vision.post_layernorm(x)
        expected = head.attention(head.probe.expand(len(x), -1, -1), normed, normed)[1][:, 0]
    torch.testing.assert_close(found, expected)


def test_gradients_reach_every_weight_that_makes_the_embedding(model):
    ReducedTower(adapt(model.train()), {1: ClassAttention(0.5)})(pictures()).square().sum().backward()
    vision = [(name, weight) for name, weight in model.named_parameters() if "text" not in name and "scale" not in name]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for _, weight in vision)


@torch.no_grad()
@pytest.mark.parametrize("places", [{1: ClassAttention(0.5)}, {(0, "middle"): EViT(0.5)}, {(1, "middle"): ToMe(3)}])
def test_reducers_shorten_it(model, places):
    tower = adapt(model)
    reduced = ReducedTower(tower, places)
    assert reduced(pictures()).isfinite().all()
    assert reduced.run(pictures())[0].shape[1] < tower.leading + 16


def test_what_is_not_adapted_is_named():
    with pytest.raises(ValueError, match="without vision_use_head gives no embedding to pool"):
        adapt(siglip(vision_use_head=False))
    with pytest.raises(ValueError, match=r"attention_dropout 0\.1 is not adapted; configure 0"):
        adapt(siglip(attention_dropout=0.1))
