"""What a user reads inside a tower: forward hooks against open_clip's, ``intermediates`` against slow formulas."""

import open_clip
import pytest
import torch

from common.clip import CLIP


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
