"""The Guide's sizes and weights, and its cross-attention against torch's."""

import pytest
import torch
from timm import create_model
from timm.layers import resample_abs_pos_embed
from torch import nn

from common.preprocess import MEAN, STD, Preprocess
from mlip.guide import Guide, GuideAttention

SMALL = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}


def test_the_default_is_a_deit_tiny_with_seventeen_tokens():
    guide = Guide()
    assert guide(torch.randn(2, 3, 224, 224)).shape == (2, 17, 192)
    reference = create_model("deit_tiny_patch16_224", num_classes=0)
    fewer_positions = (197 - 17) * 192
    count = sum(parameter.numel() for parameter in guide.parameters())
    assert count == sum(parameter.numel() for parameter in reference.parameters()) - fewer_positions
    assert {block.attn.num_heads for block in guide.vit.blocks} == {12}


def test_weights_of_a_masked_autoencoder_at_another_size_are_read(tmp_path):
    """A torch file as MAE code writes it: under "model", positions of a 14×14 grid, a decoder beside the encoder."""
    published = create_model("deit_tiny_patch16_224", num_classes=0).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 96), "decoder_embed.weight": torch.zeros(96, 192)}
    torch.save({"model": published | decoder, "epoch": 400}, tmp_path / "mae.pth")
    guide = Guide.from_weights(str(tmp_path / "mae.pth"), heads=12)
    torch.testing.assert_close(guide.vit.blocks[3].mlp.fc1.weight, published["blocks.3.mlp.fc1.weight"])
    resized = resample_abs_pos_embed(published["pos_embed"], [4, 4])
    torch.testing.assert_close(guide.vit.pos_embed, resized)
    torch.testing.assert_close(guide.vit.pos_embed[:, :1], published["pos_embed"][:, :1])


def test_a_saved_guide_comes_back_with_its_sizes(tmp_path):
    guide, images = Guide(**SMALL), torch.randn(2, 3, 48, 48)
    guide.save(tmp_path / "guide.safetensors")
    same = Guide.from_weights(str(tmp_path / "guide.safetensors"))
    assert same.sizes == SMALL
    torch.testing.assert_close(same(images), guide(images))


def test_heads_that_no_file_shows_are_asked_for(tmp_path):
    """A DeiT-Tiny of 3 heads has the shapes of an encoder of 12."""
    published = create_model("deit_tiny_patch16_224", num_classes=0)
    torch.save(published.state_dict(), tmp_path / "deit.pth")
    with pytest.raises(ValueError, match=r"deit\.pth does not record its attention heads.*say guide_heads 12"):
        Guide.from_weights(str(tmp_path / "deit.pth"))
    guide, images = Guide.from_weights(str(tmp_path / "deit.pth"), heads=3), torch.randn(1, 3, 64, 64)
    published.set_input_size(64)
    published.pos_embed.data.copy_(guide.vit.pos_embed)
    with torch.no_grad():
        torch.testing.assert_close(guide.vit.forward_features(images), published.eval().forward_features(images))
    Guide(**SMALL).save(tmp_path / "guide.safetensors")
    with pytest.raises(ValueError, match="records 2 attention heads, not 3; leave guide_heads out"):
        Guide.from_weights(str(tmp_path / "guide.safetensors"), heads=3)


def test_what_does_not_fit_is_named(tmp_path):
    Guide(**SMALL).save(tmp_path / "guide.safetensors")
    with pytest.raises(ValueError, match=r"missing blocks\.2"):
        Guide(**SMALL | {"depth": 3}, weights=str(tmp_path / "guide.safetensors"))
    with pytest.raises(ValueError, match=r"blocks.0.attn.proj.bias has shape \(32,\), expected \(64,\)"):
        Guide(**SMALL | {"width": 64}, weights=str(tmp_path / "guide.safetensors"))
    with pytest.raises(ValueError, match="no weights at"):
        Guide.from_weights(str(tmp_path / "nothing.safetensors"))


@pytest.mark.parametrize("learns", [False, True])
def test_a_frozen_guide_stays_as_it_is(learns):
    guide = Guide(**SMALL, train=learns)
    model = nn.Sequential(guide).train()
    assert guide.training == guide.vit.training == learns
    assert {parameter.requires_grad for parameter in guide.parameters()} == {learns}
    assert model(torch.randn(1, 3, 32, 32)).requires_grad == learns


def test_pictures_arrive_small_and_in_the_normalisation_of_masked_autoencoders():
    colour = torch.tensor([0.2, 0.5, 0.9])
    clips = (colour - torch.tensor(MEAN)) / torch.tensor(STD)
    guide = Guide(**SMALL)
    small = guide.shrink(clips[:, None, None].expand(1, 3, 48, 48))
    assert small.shape == (1, 3, 16, 16)
    imagenets = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(small, imagenets[:, None, None].expand(1, 3, 16, 16))
    guide.see_as(Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    again = guide.shrink((2 * colour - 1)[:, None, None].expand(1, 3, 48, 48))
    torch.testing.assert_close(again, imagenets[:, None, None].expand(1, 3, 16, 16))


def shaken(attention):
    torch.manual_seed(0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    return attention


def test_cross_attention_equals_torchs():
    ours = shaken(GuideAttention(64, 4, 32))
    theirs = nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.query.weight)
        theirs.k_proj_weight.copy_(ours.key_value.weight[:64]), theirs.v_proj_weight.copy_(ours.key_value.weight[64:])
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out_proj.weight), theirs.out_proj.bias.copy_(ours.out_proj.bias)
        x, guide = torch.randn(2, 10, 64), torch.randn(2, 17, 32)
        expected = x + theirs(ours.ln(x), guide, guide, need_weights=False)[0]
        torch.testing.assert_close(ours(x, guide), expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_starts_without_effect():
    x = torch.randn(2, 10, 64)
    torch.testing.assert_close(GuideAttention(64, 4, 32)(x, torch.randn(2, 17, 32)), x)


def test_one_guide_token_gives_every_token_the_same_vector():
    x = torch.randn(2, 10, 64)
    change = shaken(GuideAttention(64, 4, 32))(x, torch.randn(2, 1, 32)) - x
    torch.testing.assert_close(change, change[:, :1].expand_as(change), atol=1e-5, rtol=1e-4)
