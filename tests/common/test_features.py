"""What a user reads inside a tower: forward hooks against open_clip's, ``intermediates`` against slow formulas."""

import open_clip
import pytest
import torch

from common.clip import CLIP
from waveclip import WaveTower


def pair(quick_gelu=False):
    """open_clip's tiny CLIP and ours, with the same random weights."""
    torch.manual_seed(0)
    architecture = {**CLIP.tiny().architecture, "quick_gelu": quick_gelu}
    text = {key: value for key, value in architecture["text_cfg"].items() if key != "vocabulary"}
    architecture = {**architecture, "text_cfg": text}
    theirs, ours = open_clip.CLIP(**architecture).eval(), CLIP(architecture).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ours.load_weights(theirs.state_dict())
    return theirs, ours


def hooked(transformer, run):
    """The outputs of ``attn``, ``mlp``, ``c_fc`` and of every whole block, as hooks get them while ``run`` runs."""
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer, block in enumerate(transformer.resblocks):
        parts = {"attn": block.attn, "mlp": block.mlp, "c_fc": block.mlp.c_fc, "block": block}
        for name, part in parts.items():
            part.register_forward_hook(keep(f"{layer}.{name}"))
    run()
    return outputs


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_hooks_see_what_open_clips_see(mode, quick_gelu):
    theirs, ours = pair(quick_gelu)
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[7, 1, 8, *[0] * 13], [7, 2, 3, 8, *[0] * 12]])
    with mode():
        for expected, actual in (
            (
                hooked(theirs.visual.transformer, lambda: theirs.encode_image(images)),
                hooked(ours.image_tower.transformer, lambda: ours.encode_image(images)),
            ),
            (
                hooked(theirs.transformer, lambda: theirs.encode_text(ids)),
                hooked(ours.text_tower.transformer, lambda: ours.encode_text(ids)),
            ),
        ):
            assert len(expected) == 8
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_intermediates_are_open_clips_tokens_and_the_attention_of_its_class_token():
    theirs, ours = pair()
    images, inputs = torch.randn(2, 3, 32, 32), []
    blocks = theirs.visual.transformer.resblocks
    for block in blocks:
        block.ln_1.register_forward_hook(lambda module, arguments, normed: inputs.append(normed))
    tokens = hooked(theirs.visual.transformer, lambda: theirs.encode_image(images))
    outputs = ours.image_tower.intermediates(images, [-1, 0])
    for layer, output in zip((1, 0), outputs, strict=True):
        normed = inputs[layer]
        weights = blocks[layer].attn(normed, normed, normed, need_weights=True, average_attn_weights=False)[1]
        torch.testing.assert_close(output.class_attention, weights[:, :, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.class_token, tokens[f"{layer}.block"][:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.patches, tokens[f"{layer}.block"][:, 1:], atol=1e-5, rtol=0)


def equation_1(wave):
    """A query reads the keys of its own and of earlier steps, bool [N,N]."""
    step = torch.tensor([step for step in range(wave.steps) for _ in range(wave.tokens_in(step))])
    return step[:, None] >= step


@torch.no_grad()
def test_intermediates_of_a_wave_tower_are_those_of_the_masked_pass():
    wave = WaveTower.from_image_tower(pair()[1].image_tower, levels=2).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    (outputs,) = wave.intermediates(images, [1])
    mask = equation_1(wave)
    entered = wave.run_blocks(wave.embed(images), stop=1, mask=mask)
    block = wave.transformer.resblocks[1]
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    query, key, _ = (
        part.unflatten(-1, (2, 32)).transpose(1, 2) for part in (block.ln_1(entered) @ weight.T + bias).chunk(3, -1)
    )
    attention = (query @ key.transpose(-1, -2) / 32**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    tokens = block(entered, mask)
    first = 0
    for step, output in enumerate(outputs):
        after = first + wave.tokens_in(step)
        torch.testing.assert_close(output.class_token, tokens[:, first])
        torch.testing.assert_close(output.patches, tokens[:, first + 1 : after])
        torch.testing.assert_close(output.class_attention, attention[:, :, first, :after])
        first = after


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="block 2 of a tower of 2; take -2 to 1"):
        CLIP.tiny().image_tower.intermediates(torch.zeros(1, 3, 32, 32), [0, 2])
