"""CrossGET against its equations and the released order of steps, in loops over one picture's tokens."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from common.flops import count_macs
from common.reduction import ReductionContext
from common.testing import TINY_CAPTIONS
from patchrank.crossget import CrossGETTower, alignment_loss, text_cross
from patchrank.crossget_training import CrossGETTraining
from patchrank.reducers import CrossGET
from patchrank.reducers.crossget import CrossToken, complete_graph_soft_matching, cross_tokens
from tests.patchrank.reducers.slow import PATCHES, TOWER, cosine, images, projections, slow_attention, small_tower
from tests.patchrank.short_runs import Pictures, fit, moved


def learned(tokens):
    """Cross tokens as if they were trained: no vector is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for token in tokens.values():
            token.offset.copy_(torch.randn(token.offset.shape, generator=generator))
    return tokens


@torch.no_grad()
def told_apart(*norms):
    """Give norms weights and biases of their own, so that one does not pass for another."""
    generator = torch.Generator().manual_seed(7)
    for parameter in (parameter for norm in norms for parameter in norm.parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4)


@pytest.fixture
def tower():
    tower = small_tower()
    told_apart(tower.ln_pre, tower.ln_post)
    return tower


@pytest.fixture
def crossget(tower):
    """Loses 5 patches in each of 3 blocks."""
    tokens = learned(cross_tokens(TOWER["width"], TOWER["layers"])).double()
    return CrossGETTower(tower, tokens, keep=0.4).eval()


def slow_matching(keys, query, removed):
    """The released matching -> {token that goes: token into which it goes}, and all importances.

    keys: [1+K+1,D] of the class token, K patches and the cross token, of which the first and the last never merge.
    """
    count, patches = len(keys), range(1, len(keys) - 1)
    alike = [[-math.inf] * count for _ in range(count)]
    for i in patches:
        for j in patches:
            if i != j:
                alike[i][j] = cosine(keys[i], keys[j])
    order = sorted(range(count), key=lambda i: -max(alike[i]))
    importance = [cosine(key, query) for key in keys]
    score = {}
    for place, i in enumerate(order):
        score[i] = importance[i] - max((alike[i][j] for j in order[place + 1 :]), default=-math.inf)
    going = sorted(range(count), key=lambda i: score[i])[: min(removed, len(patches) // 2)]
    staying = [i for i in range(count) if i not in going]
    return {i: max(staying, key=lambda j, i=i: alike[i][j]) for i in going}, importance


def slow_merge(x, sizes, into, importance):
    """The released merging of tokens x [N,D] with their sizes -> those that stay, in their order, and their sizes."""
    total, sums = list(sizes), [size * token for size, token in zip(sizes, x, strict=True)]
    for i, j in into.items():
        weight_i, weight_j = torch.tensor([importance[i], importance[j]]).double().softmax(0).tolist()
        sums[j] = sums[j] + 2 * weight_i * sizes[i] * x[i] + (2 * weight_j - 1) * sizes[j] * x[j]
        total[j] += sizes[i]
    staying = [i for i in range(len(x)) if i not in into]
    return torch.stack([sums[i] / total[i] for i in staying]), [total[i] for i in staying]


def slow(tower, tokens, picture, removed):
    """One picture [3,S,S] through all blocks -> z [E], the sizes of its patches, and each block's cross token [L,D]."""
    x, sizes, crosses = tower.embed(picture[None])[0], [1.0] * (1 + PATCHES), []
    for number, block in enumerate(tower.transformer.resblocks):
        crosses.append(x[0] + tokens[str(number)].offset)
        query, key, _ = projections(block, torch.cat([x, crosses[-1][None]]))
        key = key.transpose(0, 1).flatten(1)
        into, importance = slow_matching(key, query[:, -1].flatten(), removed)
        x = x + slow_attention(block, x, sizes)[0]
        x, sizes = slow_merge(x, sizes, into, importance)
        x = block.feed_forward(x)
    return tower.pool(x[None])[0], sizes[1:], torch.stack(crosses)


@torch.no_grad()
def test_the_tower_merges_as_released_in_every_block(crossget, tower):
    x, context = crossget.run(images())
    assert x.shape[1] == 1 + PATCHES - 5 - 5 - 3, "a block loses half of its patches at most"
    result = crossget.crossed(images())
    for row, picture in enumerate(images()):
        z, sizes, crosses = slow(tower, crossget.tokens, picture, 5)
        torch.testing.assert_close(result.z[row], z)
        torch.testing.assert_close(crossget(images())[row], z)
        assert context.sizes[row].tolist() == sizes and max(sizes) > 2
        norm = tower.ln_pre
        joint = F.layer_norm(crosses, (TOWER["width"],), norm.weight, norm.bias) @ tower.proj
        torch.testing.assert_close(result.cross[:, row], joint)


def test_matching_four_tokens_by_hand():
    """Two pairs of neighbours: of each pair the first is compared with the second, and not the other way round."""
    similarity = torch.full((1, 4, 4), 0.1)
    similarity[0, 0, 1] = similarity[0, 1, 0] = 0.9
    similarity[0, 2, 3] = similarity[0, 3, 2] = 0.8
    equal, first_matters = torch.zeros(1, 4), torch.tensor([[0.5, 0.0, 0.0, 0.0]])
    for importance, merged, expected in (
        (equal, 1, ([0], [1, 2, 3], [0])),
        (first_matters, 1, ([2], [0, 1, 3], [2])),
        (equal, 2, ([0, 2], [1, 3], [0, 1])),
    ):
        result = complete_graph_soft_matching(similarity, importance, merged)
        assert tuple(part[0].tolist() for part in result) == expected


@torch.no_grad()
def test_a_learned_vector_changes_what_merges(crossget, tower):
    untrained = CrossGETTower(tower, keep=0.4).double()
    assert not torch.equal(untrained.run(images())[1].sizes, crossget.run(images())[1].sizes)


@torch.no_grad()
def test_tokens_do_not_tie_in_half_precision(tower):
    """Keys of neighbouring patches are so alike that bf16 gives most of their cosines one value."""
    block = tower.float().transformer.resblocks[0]
    x = torch.ones(1, 1 + PATCHES, TOWER["width"]) * torch.linspace(-1, 1, TOWER["width"])
    x = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    context = ReductionContext(torch.arange(PATCHES)[None], block=block, entered=x)
    with torch.autocast("cpu", torch.bfloat16):
        similarity, importance = CrossGET(4, CrossToken(TOWER["width"])).compare(context)
    assert similarity.dtype == importance.dtype == torch.float32
    assert len(importance.unique()) == PATCHES and len(similarity.unique()) > PATCHES * (PATCHES - 1) // 2 - 5


@torch.no_grad()
def test_a_texts_cross_token_is_as_if_it_stood_behind_the_text():
    """As released: behind every text, made anew in each block. Attention is causal, so the text itself is as it was."""
    torch.manual_seed(0)
    clip = CLIP.tiny()
    text, ids = clip.text_tower, clip.tokenizer(TINY_CAPTIONS)
    told_apart(text.ln_final)
    width, blocks = text.text_projection.shape[0], text.transformer.resblocks
    tokens = learned(cross_tokens(width, len(blocks)))
    cross, z = text_cross(text, tokens, ids), text(ids)
    for row, end in enumerate(ids.argmax(-1).tolist()):
        x = text.embed(ids[row : row + 1])
        x = torch.cat([x, x[:, :1]], dim=1)
        for number, block in enumerate(blocks):
            x = torch.cat([x[:, :-1], x[:, end : end + 1] + tokens[str(number)].offset], dim=1)
            torch.testing.assert_close(cross[number, row], text.ln_final(x[0, -1]) @ text.text_projection)
            x = block(x, "causal")
        torch.testing.assert_close(z[row], text.ln_final(x[0, end]) @ text.text_projection)


def test_the_alignment_loss_by_hand():
    """Two blocks, one pair; the second tower has one block, which serves both."""
    image = torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]]).double()
    text = torch.tensor([[[1.0, 0.0]]]).double()
    expected = 0.0
    for one in image[:, 0].tolist():
        p, q = ([math.exp(v) / sum(map(math.exp, values)) for v in values] for values in (one, [1.0, 0.0]))
        mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        expected += sum(sum(m * math.log(m / v) for m, v in zip(mean, r, strict=True)) for r in (p, q)) / 2
    assert alignment_loss(image, text).item() == pytest.approx(expected / 2)
    assert alignment_loss(text, text).item() == pytest.approx(0, abs=1e-12)


def test_blocks_of_towers_of_other_depths_meet_by_their_share_of_the_depth():
    text = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert alignment_loss(text[[0, 0, 1, 1]], text).item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(text[[0, 1, 0, 1]], text).item() > 0.01


def test_alignment_teaches_the_cross_tokens_and_the_embedding_the_tower(crossget):
    tower = dict(crossget.tower.named_parameters())
    offsets = [token.offset for token in crossget.tokens.values()]
    crossget.crossed(images()).cross.square().sum().backward()
    assert all(offset.grad.abs().sum() > 0 for offset in offsets)
    assert all(weight.grad is None for weight in tower.values())
    crossget.zero_grad()
    crossget.crossed(images()).z.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in tower.values())
    assert all(offset.grad is None for offset in offsets)


@torch.no_grad()
def test_at_keep_one_it_equals_the_tower(crossget, tower):
    whole = crossget.at(1.0)
    assert not whole.training, "as the tower that it was made of"
    torch.testing.assert_close(whole(images()), tower(images()), atol=0, rtol=0)
    torch.testing.assert_close(whole.at(0.4)(images()), crossget(images()), atol=0, rtol=0)
    assert count_macs(whole, images(1)).gmacs == count_macs(tower, images(1)).gmacs


def test_the_released_number_of_merges():
    with torch.device("meta"):
        clip = CLIP.from_open_clip("ViT-B-16")
    reducers = CrossGETTower(clip.image_tower, keep=0.47).reducers
    assert [(place, reducer.removed) for place, reducer in reducers.items()] == [((i, "middle"), 16) for i in range(12)]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    clip = CLIP.tiny()
    made = CrossGETTower(clip.image_tower, keep=0.6)
    learned(made.tokens)
    made.save(tmp_path / "crossget.safetensors", clip.architecture)
    loaded = CrossGETTower.load(tmp_path / "crossget.safetensors")
    assert loaded.keep == 0.6
    torch.testing.assert_close(loaded(images().float()), made(images().float()), atol=0, rtol=0)
    clip.save(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="does not describe a CrossGETTower"):
        CrossGETTower.load(tmp_path / "clip.safetensors")


class Captioned(Pictures):
    """The pictures of noise, each with the caption of its class."""

    def __init__(self):
        super().__init__()
        ids = CLIP.tiny().tokenizer(self.class_prompts)
        self.samples = [sample | {"text": ids[sample["label"]]} for sample in self.samples]


def test_a_short_run_trains_tower_and_cross_tokens_and_no_teacher(start):
    module = CrossGETTraining(**start, keep=0.5, warmup_steps=1, learning_rate=1e-3)
    trainer, before = fit(module, steps=20, data=Captioned())
    tower = {f"model.{name}" for name in module.model.state_dict()}
    texts = {f"text_tokens.{name}" for name in module.text_tokens.state_dict()}
    assert moved(module, before) == tower | texts
    assert {"train_cosine", "train_alignment", "val_cosine"} <= set(trainer.callback_metrics)
    merged, _ = module.deployable()
    assert merged.run(Pictures().images())[0].shape[1] < 1 + 16


def test_training_brings_the_cross_tokens_of_pictures_and_captions_together(start):
    module = CrossGETTraining(**start, keep=0.5, warmup_steps=1, learning_rate=0.02)
    module.model.tower.requires_grad_(False)
    data = Captioned()
    texts = torch.stack([sample["text"] for sample in data.samples])

    @torch.no_grad()
    def alignment():
        texts_cross = text_cross(module.clip.text_tower, module.text_tokens, texts)
        return alignment_loss(module.model.crossed(data.images()).cross, texts_cross).item()

    untrained = alignment()
    fit(module, steps=20, data=data)
    assert alignment() < untrained / 2


def test_batches_without_texts_are_refused(start):
    with pytest.raises(ValueError, match="these batches have none; set captions: true"):
        fit(CrossGETTraining(**start, keep=0.5, warmup_steps=1))
    with pytest.raises(ValueError, match=r"keep 1\.5 is not in \(0, 1\]"):
        CrossGETTraining(**start, keep=1.5)


def test_blocks_of_another_library_are_refused():
    x = torch.zeros(1, 1 + PATCHES, 8)
    context = ReductionContext(torch.arange(PATCHES)[None], block=torch.nn.Identity(), entered=x)
    with pytest.raises(ValueError, match="trained for blocks of this suite; Identity is another library's"):
        CrossGET(4, CrossToken(8))(x, context)
    with pytest.raises(ValueError, match="trains this suite's ImageTower; Identity is another library's"):
        CrossGETTower(torch.nn.Identity())
