"""The towers of transformers' CLIP and SigLIP, with random weights of small configurations."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, SiglipConfig, SiglipModel

from common.adapters import adapt
from common.flops import count_macs
from common.reduction import ReducedTower
from patchrank.baselines import ClassAttention, ToMe
from patchrank.golden import golden_ranking
from waveclip import AdaptedWaveTower

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
FAMILIES = {
    "CLIP": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
    "SigLIP": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def model_of(name):
    torch.manual_seed(0)
    model = FAMILIES[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def features(model):
    result = model.get_image_features(images())
    return result if isinstance(result, torch.Tensor) else result.pooler_output


@each_family
@torch.no_grad()
def test_without_reducers_it_equals_the_original(name):
    model = model_of(name)
    tower = adapt(model)
    torch.testing.assert_close(tower(images()), features(model), atol=1e-10, rtol=0)
    assert tower(images()).shape == (2, tower.embed_dim)


@torch.no_grad()
def test_a_vision_model_alone_is_not_projected():
    model = model_of("CLIP")
    alone = CLIPVisionModel(model.config.vision_config).double().eval()
    torch.testing.assert_close(adapt(alone)(images()), alone(images()).pooler_output, atol=1e-10, rtol=0)


@each_family
@torch.no_grad()
def test_reducers_rankings_counts_and_wavelet_levels(name):
    tower = adapt(model_of(name))
    reduced = ReducedTower(tower, {(0, "middle"): ToMe(4), 1: ClassAttention(0.5)})
    assert reduced.run(images())[0].shape[1] == tower.leading + 6 and reduced(images()).isfinite().all()
    order = golden_ranking(tower, images(), prune_layer=1).order
    assert order.sort(1).values.tolist() == [list(range(16))] * 2
    wave = AdaptedWaveTower.from_image_tower(tower).double()
    torch.testing.assert_close(wave(images())[0], wave.begin(images())[0], atol=1e-10, rtol=0)
    assert count_macs(tower.float(), images().float()[:1]).gmacs > 0


@torch.no_grad()
def test_the_heads_query_is_the_class_attention_of_siglip():
    tower = adapt(model_of("SigLIP"))
    x = tower.run_blocks(tower.embed(images()))
    normed, head = tower.source.post_layernorm(x), tower.source.head
    _, weights = head.attention(head.probe.expand(2, -1, -1), normed, normed)
    torch.testing.assert_close(tower.transformer.resblocks[0].class_logits(x).softmax(-1).mean(1), weights[:, 0])


@torch.no_grad()
def test_the_pooling_head_weighs_tokens_by_their_bias():
    tower = adapt(model_of("SigLIP"))
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    bias = F.pad(torch.zeros(2, 1, 1, 4, dtype=x.dtype), (0, 4), value=-torch.inf)
    torch.testing.assert_close(tower.pool(x, bias=bias), tower.pool(x[:, :4]), atol=1e-10, rtol=0)
