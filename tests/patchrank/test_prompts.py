"""Prompts against a slow forward pass written out, no-op prompts against the plain towers, and the two files."""

import pytest
import torch

from common.clip import CLIP
from common.models import load_model
from patchrank.predictor import RankPredictor
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Prompts, prompted_text, words_by_layer
from patchrank.tower import PatchRankTower

KINDS = ("coupled", "independent", "text", "visual")
TEXTS = ["a red cat", "a dog on the green of the bird"]


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP.tiny()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32)


def prompts(kind="coupled", **options):
    torch.manual_seed(2)
    made = Prompts(kind, **{"count": 2, "depth": 2, "text_width": 64, "image_width": 64} | options)
    for parameter in made.parameters():  # larger than they start, so that a misplaced one shows
        parameter.data.mul_(20)
    return made


def slow_image(tower, images, prompts, layer, keep):
    """z with prompts after the patches, the patches ``keep`` [B,R] alone from block ``layer`` on."""
    rows = []
    for image, places in zip(images, keep, strict=True):
        x = tower.embed(image[None])[0]
        visual = tower.ln_pre(prompts.visual_at(0))
        for number, block in enumerate(tower.transformer.resblocks):
            if number == layer:
                x = torch.stack([x[0], *(x[1 + place] for place in places)])
            if 0 < number < prompts.depth:
                visual = prompts.visual_at(number)
            y = block(torch.cat([x, visual])[None])[0]
            x, visual = y[: len(x)], y[len(x) :]
        rows.append(tower.pool(x[None])[0])
    return torch.stack(rows)


def slow_text(tower, ids, prompts):
    """z with prompts after start-of-text, one text at a time and without padding."""
    rows = []
    for row in ids:
        row = row[: int(row.argmax()) + 1]
        x = torch.stack([tower.token_embedding.weight[i] for i in row])
        x = torch.cat([x[:1], prompts.text_at(0), x[1:]])
        x = x + tower.positional_embedding[: len(x)]
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        for number, block in enumerate(tower.transformer.resblocks):
            if 0 < number < prompts.depth:
                x = torch.cat([x[:1], prompts.text_at(number), x[1 + prompts.texts :]])
            x = block(x[None], mask)[0]
        rows.append(tower.ln_final(x)[-1] @ tower.text_projection)
    return torch.stack(rows)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["coupled", "independent", "visual"])
@torch.no_grad()
def test_image_prompts_stand_after_the_patches_and_are_replaced_in_every_layer(clip, images, kind, depth):
    made, everything = prompts(kind, depth=depth), torch.arange(16).expand(3, -1)
    result = PatchRankTower(clip.image_tower, None, 1.0, prompts=made)(images)
    torch.testing.assert_close(result, slow_image(clip.image_tower, images, made, 0, everything), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_pruning_keeps_every_prompt_and_the_predictor_reads_none(clip, images, layer):
    made, predictor, tower = prompts(), RankPredictor(64, 17), clip.image_tower
    pruned = PatchRankTower(tower, predictor, 0.5, layer, made)
    x, context = pruned.run(images)
    assert context.trailing == 2 and x.shape[1] == 1 + 8 + 2
    entering = tower.embed(images)
    if layer:
        visual = tower.ln_pre(made.visual_at(0)).expand(3, -1, -1)
        entering = tower.run_blocks(torch.cat([entering, visual], dim=1), stop=1)[:, :17]
    kept = predictor(entering).topk(8).indices.sort(-1).values
    assert torch.equal(context.positions, kept)
    torch.testing.assert_close(pruned(images), slow_image(tower, images, made, layer, kept), atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["coupled", "independent", "text"])
@torch.no_grad()
def test_text_prompts_stand_after_start_of_text(clip, kind, depth):
    made, ids = prompts(kind, depth=depth), clip.tokenizer(TEXTS)
    expected = slow_text(clip.text_tower, ids, made)
    torch.testing.assert_close(prompted_text(clip.text_tower, ids, made), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_words_as_prompts_are_the_words_in_the_text(clip, depth):
    start = words_by_layer(clip.text_tower, clip.tokenizer(["red bird"], longest=True), depth)
    made = Prompts("text", 2, depth, 64, 64, start=start)
    result = prompted_text(clip.text_tower, clip.tokenizer(TEXTS), made)
    expected = clip.text_tower(clip.tokenizer([f"red bird {text}" for text in TEXTS]))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_prompts_and_nothing_pruned_is_the_plain_clip(clip, images, kind):
    model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, None, 1.0, prompts=prompts(kind, count=0)))
    ids = clip.tokenizer(TEXTS)
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(ids), clip.encode_text(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "untouched"), [("text", "image"), ("visual", "text")])
@torch.no_grad()
def test_prompts_of_one_encoder_leave_the_other_alone(clip, images, kind, untouched):
    model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, None, 1.0, prompts=prompts(kind)))
    ids = clip.tokenizer(TEXTS)
    same = {
        "image": torch.allclose(model.encode_image(images), clip.encode_image(images), atol=1e-5),
        "text": torch.allclose(model.encode_text(ids), clip.encode_text(ids), atol=1e-5),
    }
    assert same.pop(untouched) and not any(same.values())


@torch.no_grad()
def test_coupled_image_prompts_are_a_linear_map_of_the_text_prompts():
    made = prompts()
    for layer in range(2):
        weight, bias = made.couplings[layer].weight, made.couplings[layer].bias
        expected = torch.stack([weight @ prompt + bias for prompt in made.text[layer]])
        torch.testing.assert_close(made.visual_at(layer), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_and_coupling_gets_a_gradient(clip, images, kind):
    made = prompts(kind)
    model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, RankPredictor(64, 17), 0.5, 1, made))
    (model.encode_image(images).sum() + model.encode_text(clip.tokenizer(TEXTS)).sum()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum(tuple(range(1, parameter.ndim))).all(), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exported_prompts_are_the_same_without_couplings(clip, images, kind, tmp_path):
    made, ids = prompts(kind), clip.tokenizer(TEXTS)
    made.save(tmp_path / "prompts.safetensors")
    again = Prompts.load(tmp_path / "prompts.safetensors")
    assert again.couplings is None and not any(p.requires_grad is False for p in again.parameters())
    tower = clip.image_tower
    before, after = (PromptedCLIP(clip, PatchRankTower(tower, None, 1.0, prompts=learned)) for learned in (made, again))
    assert torch.equal(before.encode_image(images), after.encode_image(images))
    assert torch.equal(before.encode_text(ids), after.encode_text(ids))


def test_sizes_of_the_two_files_at_vit_b_16(tmp_path):
    made = Prompts()  # 2 + 2, 9 layers, text width 512, image width 768
    made.save(tmp_path / "prompts.safetensors")
    trained = 4 * sum(parameter.numel() for parameter in made.parameters())
    assert trained == 4 * 9 * (2 * 512 + 512 * 768 + 768) and 14.0e6 < trained < 14.5e6
    exported = (tmp_path / "prompts.safetensors").stat().st_size
    assert 4 * 9 * 2 * (512 + 768) < exported < 100_000


@torch.no_grad()
def test_a_whole_tuned_model_comes_back_by_the_commands_loader(clip, images, tmp_path):
    ids = clip.tokenizer(TEXTS)
    model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, RankPredictor(64, 17), 0.5, 1, prompts()))
    model.save(tmp_path / "tuned.safetensors")
    again = PromptedCLIP.load(tmp_path / "tuned.safetensors")
    assert again.tower.prompts.couplings is None
    for loaded in (again, load_model(str(tmp_path / "tuned.safetensors")).images):
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))
    model.tower.save(tmp_path / "tower.safetensors", clip.architecture)
    alone = load_model(str(tmp_path / "tower.safetensors"))
    assert alone.type == "patchrank" and alone.texts is None
    assert torch.equal(alone.images.encode_image(images), model.encode_image(images))


def test_what_does_not_go_together_is_refused(clip, tmp_path):
    tower = clip.image_tower
    clip.save(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="kind 'both' is none of coupled, independent, text, visual"):
        prompts("both")
    with pytest.raises(ValueError, match="2 prompts in 0 layers"):
        prompts(depth=0)
    with pytest.raises(ValueError, match=r"a start of \(2, 3, 64\) for 2 text prompts in 2 layers"):
        prompts(start=torch.zeros(2, 3, 64))
    with pytest.raises(ValueError, match="prompts of depth 3 for a tower of 2 blocks; take 2 at most"):
        PatchRankTower(tower, None, 1.0, prompts=prompts(depth=3))
    with pytest.raises(ValueError, match="prompts of depth 3 for a tower of 2 blocks"):
        PromptedCLIP(clip, PatchRankTower(tower, None, 1.0, prompts=prompts("text", depth=3)))
    with pytest.raises(ValueError, match="texts of 16 tokens and 2 prompts exceed the context of 16"):
        prompted_text(clip.text_tower, clip.tokenizer(["a cat " * 7]), prompts())
    with pytest.raises(ValueError, match="holds no prompts"):
        Prompts.load(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="does not describe a PromptedCLIP"):
        PromptedCLIP.load(tmp_path / "clip.safetensors")
