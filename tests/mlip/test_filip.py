"""FILIP: scoring by tokens against loops, saving, and its training's one term."""

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from common.data.lookup import Labelled
from common.evaluate.tasks import Settings, scorer, zero_shot
from common.models import Model
from common.testing import TINY_CAPTIONS, tiny_architecture
from mlip.alignment import caption_mask, late_interaction
from mlip.filip import FILIP, FILIPPretraining
from mlip.model import MLIP


@pytest.fixture
def filip():
    torch.manual_seed(0)
    return FILIP(MLIP(CLIP.tiny().architecture), token_dim=12).eval()


PROMPTS = [[f"{caption} on the dog", caption] for caption in TINY_CAPTIONS[:3]]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_loops(filip):
    """Each picture's score of each class: the mean over prompts and patches of the best cosine with a word."""
    scores = []
    for patches in filip.image_tokens(IMAGES):
        row = []
        for texts in PROMPTS:
            total = 0.0
            for text in texts:
                ids = filip.tokenizer([text], longest=True)
                words = filip.text_tokens(ids)[0, 1 : ids.argmax() + 1]
                best = [max(float(F.cosine_similarity(p, w, dim=0)) for w in words) for p in patches]
                total += sum(best) / len(best) / len(texts)
            row.append(total)
        scores.append(row)
    return torch.tensor(scores)


@torch.no_grad()
def test_classes_are_scored_by_tokens(filip):
    torch.testing.assert_close(filip.class_scorer(PROMPTS)(IMAGES), by_loops(filip), atol=1e-5, rtol=1e-4)


def test_classes_with_other_numbers_of_prompts_are_refused(filip):
    with pytest.raises(ValueError, match=r"\[1, 3\] prompts for the classes"):
        filip.class_scorer([["a cat"], ["a dog", "a bird", "red"]])


@torch.no_grad()
def test_classes_are_scored_in_the_precision_that_is_asked_for(filip):
    model = Model("made-up", "filip", 32, filip, filip, {"image": "i", "text": "t"}, {})
    names = [caption[2:] for caption in TINY_CAPTIONS[:3]]
    full, half = (scorer(model, names, ["a {}"], Settings(dtype=dtype))(IMAGES) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=0.03, rtol=0)


@torch.no_grad()
def test_evaluation_takes_the_models_own_scores(filip):
    labels = by_loops(filip).argmax(1)

    def loader(image_size, batch_size, workers):
        return [{"image": IMAGES, "label": labels, "key": ["a", "b"]}]

    source = Labelled("test", [caption[2:] for caption in TINY_CAPTIONS[:3]], ("a {}",), "accuracy", loader)
    model = Model("made-up", "filip", 32, filip, filip, {"image": "i", "text": "t"}, {})
    templates = ["a {} on the dog", "a {}"]
    assert zero_shot(model, source, templates, Settings())["top1"] == 1.0


@torch.no_grad()
def test_a_saved_model_is_the_same(filip, tmp_path):
    filip.save(tmp_path / "filip.safetensors")
    again = FILIP.load(tmp_path / "filip.safetensors").eval()
    ids = filip.tokenizer([PROMPTS[0][0]])
    assert torch.equal(again.encode_image(IMAGES), filip.encode_image(IMAGES))
    assert torch.equal(again.encode_text(ids), filip.encode_text(ids))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("same", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]], ids=["apart", "two alike"])
def test_the_loss_is_late_interaction_alone_and_every_parameter_learns(tmp_path, same, smoothing):
    torch.manual_seed(0)
    options = {"token_dim": 12, "keys": 3, "label_smoothing": smoothing, "warmup_steps": 2}
    module = FILIPPretraining(architecture=tiny_architecture(tmp_path), **options)
    ids, same = module.clip.tokenizer(list(TINY_CAPTIONS), longest=True), torch.tensor(same)
    batch = {"image": torch.randn(6, 3, 32, 32), "text": ids, "caption_id": same}
    tokens = module.clip.image_tokens(batch["image"]), module.clip.text_tokens(ids), caption_mask(ids)
    expected = late_interaction(*tokens, module.clip.logit_scale.exp(), same=same, label_smoothing=smoothing, keys=3)
    loss = module.loss(batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("options", [{"keys": 0}, {"token_dim": 0}])
def test_senseless_settings_are_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} 0 must be at least 1"):
        FILIPPretraining(architecture=tiny_architecture(tmp_path), **options)
