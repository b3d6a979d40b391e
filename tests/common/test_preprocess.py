"""How pictures are prepared: what is known of a model, what is asked for, and where it is kept."""

from types import SimpleNamespace

import open_clip
import pytest

from common import directory
from common.checkpoints import restore
from common.clip import CLIP
from common.models import load_model
from common.preprocess import MEAN, Preprocess, choose_preprocess, prepare_data
from common.pretrained import find_pretrained
from common.testing import tiny_architecture
from waveclip import WaveCLIPDistillation

SQUASH = Preprocess(32, mean=(0.5, 0.5, 0.5), interpolation="bilinear", resize_mode="squash")


def test_a_tag_brings_its_own():
    dfn = find_pretrained("ViT-H-14-quickgelu", "dfn5b", 224)
    assert dfn.preprocess == Preprocess(224, resize_mode="squash") and dfn.quick_gelu
    siglip = choose_preprocess("ViT-B-16-SigLIP", "webli", None, 224)
    assert siglip == Preprocess(224, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16", Preprocess(224)),
        ("MobileCLIP-S2", Preprocess(224, (0, 0, 0), (1, 1, 1), "bilinear")),
        ("ViT-S-16", Preprocess(224)),  # open_clip has no weights of it
    ],
)
def test_a_local_file_is_prepared_as_all_weights_of_its_name_are(name, expected):
    assert choose_preprocess(name, None, None, 224) == expected


def test_where_the_weights_of_a_name_differ_it_is_asked_for():
    with pytest.raises(ValueError, match=r"weights of ViT-L-14 .* in 2 ways.*--preprocess .*clip, or a tag .*openai"):
        choose_preprocess("ViT-L-14", None, None, 224)
    assert choose_preprocess("ViT-L-14", None, "clip", 224) == Preprocess(224)
    assert choose_preprocess("ViT-L-14", None, "laion2b_s32b_b82k", 224).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="preprocess 'squash' is neither clip nor a weights tag of ViT-L-14"):
        choose_preprocess("ViT-L-14", None, "squash", 224)


def test_words_of_open_clip_that_mean_a_default():
    config = {"size": [224, 224], "mode": "RGB", "mean": 0.5, "interpolation": "random", "fill_color": None}
    assert Preprocess.read(config, 32) == Preprocess(32, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="resize_mode 'stretch' is none of shortest, longest, squash"):
        Preprocess.read({"resize_mode": "stretch"}, 32)


def test_only_another_one_than_clips_is_written_down(tmp_path):
    plain = CLIP.tiny()
    assert Preprocess(32).recorded_in(SQUASH.recorded_in(plain.architecture)) == plain.architecture
    squash = CLIP(SQUASH.recorded_in(plain.architecture))
    for clip, expected in ((plain, Preprocess(32)), (squash, SQUASH)):
        clip.save(tmp_path / "a.safetensors")
        assert load_model(str(tmp_path / "a.safetensors")).preprocess == expected
        assert CLIP.load(tmp_path / "a.safetensors").preprocess == expected


def test_a_teachers_pictures_are_shown_in_training_and_kept_with_its_student(tmp_path):
    """Also where the checkpoint is opened without the teacher's file."""
    file = tmp_path / "teacher.safetensors"
    CLIP(SQUASH.recorded_in(CLIP.tiny().architecture)).save(file)
    training = WaveCLIPDistillation(tiny_architecture(tmp_path), str(file))
    data = SimpleNamespace(preprocess=Preprocess(48))
    prepare_data(SimpleNamespace(datamodule=data), training.teacher.preprocess)
    assert data.preprocess == Preprocess(48, SQUASH.mean, SQUASH.std, "bilinear", "squash")
    file.unlink()
    checkpoint = {"state_dict": training.state_dict(), "hyper_parameters": dict(training.hparams)}
    directory.write(tmp_path / "model", *restore(WaveCLIPDistillation, checkpoint).deployable())
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.preprocess == SQUASH


def test_a_recipe_may_say_it_in_open_clips_words(tmp_path):
    CLIP.tiny().save(tmp_path / "a.safetensors")
    clip = CLIP.from_open_clip(
        tiny_architecture(tmp_path), str(tmp_path / "a.safetensors"), preprocess={"resize_mode": "longest"}
    )
    assert clip.preprocess == Preprocess(32, resize_mode="longest")


def test_the_default_is_open_clips():
    assert open_clip.OPENAI_DATASET_MEAN == MEAN
    assert Preprocess(32).recorded_in({"embed_dim": 1}) == {"embed_dim": 1}
