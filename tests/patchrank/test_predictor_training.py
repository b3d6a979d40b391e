"""The predictor's training by short runs: what moves and what stays, its rankings and its measures."""

import functools

import pytest
import torch

from patchrank.golden import golden_ranking
from patchrank.losses import kendall_tau, pruned_overlap
from tests.patchrank.short_runs import CLASSES, Pictures, fit, moved

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("loss", ["keep_set", "margin", "listwise"])
def test_the_predictor_learns_the_golden_rankings_and_the_clip_stays(predictor, loss):
    module, data = predictor(loss=loss), Pictures()
    _, before = fit(module, steps=60)
    changed = moved(module, before)
    assert changed and all(key.startswith("predictor.") for key in changed)
    order = golden_ranking(module.clip.image_tower, data.images(), prune_layer=1).order
    with torch.no_grad():
        scores = module(data.images())
    assert pruned_overlap(scores, order, 8).mean() > 0.8


def test_validation_and_test_state_overlap_and_tau(predictor):
    module, data = predictor(), Pictures()
    trainer, _ = fit(module)
    order = golden_ranking(module.clip.image_tower, data.images(), prune_layer=1).order
    with torch.no_grad():
        scores = module(data.images())
    expected = {"overlap": pruned_overlap(scores, order, 8).mean(), "tau": kendall_tau(scores, order).mean()}
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        (metrics,) = run(module, data, verbose=False)
        for name, value in expected.items():
            assert metrics[f"{split}_{name}"] == pytest.approx(value.item(), abs=1e-6)


def test_pictures_are_ranked_as_the_frozen_clip_was_trained_on_them(predictor):
    module, data = predictor(preprocess={"resize_mode": "squash", "std": [0.5, 0.5, 0.5]}), Pictures()
    fit(module, data=data)
    assert data.preprocess == module.clip.preprocess and data.preprocess.resize_mode == "squash"


def test_the_cosine_ends_at_the_final_rate(predictor):
    trainer, _ = fit(predictor(learning_rate=1e-3, warmup_steps=0, final_learning_rate=1e-4), steps=10)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"final_learning_rate 0\.002 must lie from 0 to the peak, 0\.001"):
        predictor(learning_rate=1e-3, final_learning_rate=2e-3)


def test_rankings_are_computed_on_first_use_alone(predictor, monkeypatch):
    fit(predictor())

    @functools.wraps(golden_ranking)
    def refuse(*_, **__):
        raise AssertionError("ranked again")

    monkeypatch.setattr("patchrank.golden_cache.golden_ranking", refuse)
    fit(predictor(loss="margin"))
    with pytest.raises(AssertionError, match="ranked again"):
        fit(predictor(block=1))


@pytest.mark.parametrize("score", ["label", "confidence"])
def test_rankings_may_preserve_the_classes(predictor, score):
    module = predictor(score=score)
    fit(module)
    classes = module.clip.encode_text(module.clip.tokenizer(list(CLASSES))).detach()
    labels = torch.arange(12) % 4
    scale, images = module.clip.logit_scale.exp(), Pictures().images()
    text = {"class_embeddings": classes, "logit_scale": scale, "labels": labels}
    expected = golden_ranking(module.clip.image_tower, images, score, prune_layer=1, **text)
    assert torch.equal(module._golden["train"].of([str(i) for i in range(12)]), expected.order)


def test_random_views_have_no_golden_ranking(predictor):
    with pytest.raises(ValueError, match="set the data's augment: false"):
        fit(predictor(), data=Pictures(augment=True))
    with pytest.raises(ValueError, match=r"keep 1\.0 prunes nothing of 16 patch tokens"):
        predictor(keep=1.0)
    with pytest.raises(ValueError, match="prune_layer 2 is none of the 2 blocks"):
        predictor(prune_layer=2)
