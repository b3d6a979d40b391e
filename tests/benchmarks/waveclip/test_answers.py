"""A model's answers: what they hold, how they are kept, and the early exits that are made of them."""

import numpy as np
import pytest
import torch

from benchmarks.waveclip import answers
from benchmarks.waveclip.answers import Answers
from common.clip import CLIP
from common.testing import TINY_CAPTIONS
from common.zeroshot import embed_prompts
from waveclip import MarginGate, MaxProbabilityGate, ProgressiveClassifier, WaveTower


def batches(pictures=6):
    torch.manual_seed(0)
    images, labels = torch.randn(pictures, 3, 32, 32), torch.arange(pictures) % 4
    return [{"image": images[:4], "label": labels[:4]}, {"image": images[4:], "label": labels[4:]}]


def test_answers_are_those_of_the_softmax_over_the_prompts():
    clip, prompts = CLIP.tiny().eval(), list(TINY_CAPTIONS)
    wave = WaveTower.from_image_tower(clip.image_tower, levels=1).eval()
    result = answers.answers(wave, clip, batches(), prompts)
    images, labels = (torch.cat([batch[key] for batch in batches()]) for key in ("image", "label"))
    with torch.no_grad():
        classes = embed_prompts(clip, prompts)
        coarse, fine = (
            (clip.logit_scale.exp() * torch.nn.functional.normalize(z, dim=-1) @ classes.T).softmax(-1)
            for z in wave(images)
        )
    first, second = coarse.sort(dim=-1, descending=True).values[:, :2].T
    assert np.array_equal(result.correct, torch.stack([coarse.argmax(1) == labels, fine.argmax(1) == labels]).numpy())
    np.testing.assert_allclose(result.margin, (first - second)[None].half(), atol=1e-3)
    np.testing.assert_allclose(result.maximum, first[None].half(), atol=1e-3)


def real(wave, clip, gate):
    """Right answers [M] and exit steps [M] of the real classifier."""
    prompts = list(TINY_CAPTIONS)
    classify = ProgressiveClassifier(wave, embed_prompts(clip, prompts), clip.logit_scale.exp(), gate).eval()
    found = [(classify(batch["image"]), batch["label"]) for batch in batches(16)]
    right = [prediction.scores.argmax(-1) == label for prediction, label in found]
    return torch.cat(right).numpy(), torch.cat([prediction.exit_step for prediction, _ in found]).numpy()


@pytest.mark.parametrize("levels", [1, 2])
def test_early_exit_from_answers_is_that_of_the_real_classifier(levels):
    torch.manual_seed(1)
    clip = CLIP.tiny().eval()
    wave = WaveTower.from_image_tower(clip.image_tower, levels=levels).eval()
    found = answers.answers(wave, clip, batches(16), list(TINY_CAPTIONS))
    steps = found.steps(found.last)
    ordered = np.sort(found.margin.ravel())
    # Half-way between two margins: a picture's own would be rounded otherwise in another batch.
    for threshold in ((ordered[1:] + ordered[:-1]) / 2)[::4].tolist():
        correct, goes_on = steps.at(threshold)
        expected, exit_step = real(wave, clip, MarginGate(threshold))
        assert np.array_equal(correct, expected) and np.array_equal(goes_on.sum(0), exit_step)


def test_the_maximum_probability_is_that_of_the_real_gate():
    torch.manual_seed(1)
    clip = CLIP.tiny().eval()
    wave = WaveTower.from_image_tower(clip.image_tower, levels=1).eval()
    found = answers.answers(wave, clip, batches(16), list(TINY_CAPTIONS))
    threshold = float(np.sort(found.maximum[0])[7:9].mean())
    _, exit_step = real(wave, clip, MaxProbabilityGate(threshold))
    assert np.array_equal(exit_step == 0, found.maximum[0] >= threshold) and 0 < exit_step.sum() < 16


def test_a_plain_clip_has_one_level_with_its_confidence():
    clip = CLIP.tiny().eval()
    result = answers.answers(clip, clip, batches(), list(TINY_CAPTIONS))
    assert result.correct.shape == result.margin.shape == (1, 6)


def test_models_that_are_asked_together_answer_as_alone():
    clip = CLIP.tiny().eval()
    wave = WaveTower.from_image_tower(clip.image_tower, levels=1).eval()
    together = answers.answers_of_all({"clip": (clip, clip), "wave": (wave, clip)}, batches(), list(TINY_CAPTIONS))
    for name, model in (("clip", clip), ("wave", wave)):
        alone = answers.answers(model, clip, batches(), list(TINY_CAPTIONS))
        assert np.array_equal(together[name].correct, alone.correct)
        assert np.array_equal(together[name].margin, alone.margin)


class Drawing(CLIP):
    """Embeds pictures of noise that it draws itself."""

    def encode_image(self, images):
        return super().encode_image(torch.randn_like(images))


def test_a_model_that_draws_answers_alike_in_every_pass():
    clip = Drawing(CLIP.tiny().architecture).eval()
    first, again = (answers.answers(clip, clip, batches(), list(TINY_CAPTIONS)) for _ in range(2))
    assert np.array_equal(first.margin, again.margin)
    assert len(np.unique(first.margin)) == 6, "each batch has draws of its own"


def example(pictures=11, levels=2, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.random((max(1, levels - 1), pictures)).astype(np.float32)
    return Answers(rng.random((levels, pictures)) < 0.5, confidence, confidence / 2)


def test_a_file_gives_back_what_was_written(tmp_path):
    splits = {"val": example(11), "test": example(16, seed=1)}
    answers.write(tmp_path / "a.npz", splits)
    found = answers.read(tmp_path / "a.npz")
    assert found.keys() == splits.keys()
    for split, part in found.items():
        for name in ("correct", "margin", "maximum"):
            value, expected = getattr(part, name), getattr(splits[split], name)
            assert value.dtype == expected.dtype and np.array_equal(value, expected)


def test_confidences_of_the_first_files_are_read_as_the_others(tmp_path):
    """They are fp16 on disk, in which a threshold between two of them would be rounded."""
    rounded = example()
    answers.write(tmp_path / "a.npz", {"val": Answers(rounded.correct, *2 * [rounded.margin.astype(np.float16)])})
    assert answers.read(tmp_path / "a.npz")["val"].margin.dtype == np.float32


def test_a_cascade_asks_the_second_model_where_the_first_is_unsure():
    first, second = example(levels=1), example(levels=1, seed=1)
    exits = first.cascade(second, second.last)
    assert np.array_equal(exits.confidence, first.margin[0])
    assert np.array_equal(exits.first, first.correct[0]) and np.array_equal(exits.second, second.correct[0])
