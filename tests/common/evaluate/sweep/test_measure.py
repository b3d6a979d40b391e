"""One point of a sweep on models of other shapes: a SigLIP, a Patch Ranking model, schedules, memory, pictures."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.clip import CLIP
from common.data.lookup import Labelled
from common.evaluate.points import Point, at_size, completed, images_at
from common.evaluate.sweep.measure import WHOLE, Measure
from common.evaluate.sweep.pictures import Pictures, packed, unpacked
from common.evaluate.sweep.scoring import ZeroShot
from common.evaluate.tasks import Settings
from common.flops import count_macs
from common.memory import working_memory
from common.models import OPEN_CLIP, Model
from common.preprocess import Preprocess
from common.reducer_registry import installed_reducers, named
from common.reduction import ReducedTower
from patchrank import PatchRankTower, RankPredictor
from patchrank.dynamicvit import DynamicViTTower
from patchrank.reducers import DivPrune
from tests.common.foreign import foreign
from tests.common.towers import NAMES, pictures

SETTINGS = Settings(batch_size=4, workers=0)


class SigLIPShaped(nn.Module):
    """A random tower of SigLIP's shape, without a class token, as open_clip's models hold theirs."""

    def __init__(self):
        super().__init__()
        self.visual = foreign("SigLIP").float()

    def encode_image(self, images, normalize=True):
        z = self.visual(images)
        return F.normalize(z, dim=-1) if normalize else z


def model_of(images, embed_dim, kind=OPEN_CLIP):
    torch.manual_seed(0)
    clip = CLIP({**CLIP.tiny().architecture, "embed_dim": embed_dim}).eval()
    return Model("random", kind, Preprocess(32), images.eval(), clip, {"image": "", "text": "random"}, {})


def split_of(count=8):
    """Noise with labels in turn, read in batches of 4; the second is the number of times that it was read."""
    reads = []

    def loader(preprocess, batch_size, workers):
        reads.append(batch_size)
        for part in range(0, count, batch_size):
            yield {
                "image": pictures(count)[part : part + batch_size],
                "label": torch.arange(count)[part : part + 4] % 3,
            }

    return Labelled("test", NAMES, (), "accuracy", loader), reads


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))


def records(model, points):
    data, _ = split_of()
    scoring = ZeroShot(model, Pictures(model, data, SETTINGS), SETTINGS, ("a {}",))
    measure = Measure(model, "cpu", ())
    return {point: measure(point, scoring, iter) for point in points}


def test_every_reducer_runs_on_a_siglip_or_says_why_not():
    model = model_of(SigLIPShaped(), 16)
    names = sorted(installed_reducers())
    points = [WHOLE, *[completed(model, Point(name, named(name).rate(0.5))) for name in names]]
    measured = records(model, points)
    needs = {name: set(entry.needs) for name, entry in installed_reducers().items()}
    for point, record in measured.items():
        if point != WHOLE and "reason" not in record and "readout" not in needs[point.reducer]:
            assert record["gmacs"] < measured[WHOLE]["gmacs"], point.name
    failed = {point.reducer: record["reason"] for point, record in measured.items() if "reason" in record}
    assert failed.keys() == {"recoverable-compression", *(name for name in names if "training" in needs[name])}
    assert "this tower has no class token; take" in failed["recoverable-compression"]


@torch.no_grad()
def test_several_places_keep_the_share_at_each_of_them():
    clip = CLIP.tiny().eval()
    tower, images = clip.image_tower, pictures(2)
    expected = ReducedTower(tower, {0: DivPrune(0.5), 1: DivPrune(0.5)})
    model = model_of(clip, 32, "CLIP")
    reduced = images_at(model, Point("divprune", 0.5, (0, 1)))
    assert reduced.run(images)[0].shape[1] == 1 + 4, "of 16 patches 8, then 4"
    torch.testing.assert_close(reduced(images), expected(images))
    with pytest.raises(ValueError, match="tome spreads over several blocks from one on"):
        images_at(model, Point("tome", 0.5, (0, 1)))
    for name in ("gtp", "centre-crop"):  # they read where patches stand, of which some may be gone
        assert images_at(model, Point(name, 0.5, (0, 1))).run(images)[0].shape[1] == 1 + 4
    with pytest.raises(ValueError, match="half-resolution needs every patch of a square grid; 4 tokens"):
        images_at(model, Point("half-resolution", 0.25, (0, 1)))
    kept = images_at(model, Point("mlip-merging", 1.0, (0, 1))).run(images)[0]
    assert kept.shape[1] == 1 + 16, "at keep 1 nothing is to be merged"
    with pytest.raises(ValueError, match="must be numbers of blocks in ascending order"):
        images_at(model, Point("divprune", 0.5, (1, 0)))


def test_a_patch_ranking_model_stands_beside_other_reducers():
    torch.manual_seed(0)
    tower = CLIP.tiny().image_tower
    ranked = PatchRankTower(tower, RankPredictor.for_tower(tower), 0.5, 1)
    model = model_of(ranked, 32, "patchrank")
    whole, own, other = records(model, [WHOLE, Point(keep=0.5), Point("divprune", 0.5, (1,))]).values()
    assert whole["gmacs"] < own["gmacs"], "in so small a tower, ranking costs more than half of the patches"
    assert other["gmacs"] < whole["gmacs"] == count_macs(tower, pictures(1)).gmacs
    image = pictures(1)
    torch.testing.assert_close(images_at(model, WHOLE)(image), tower(image))
    torch.testing.assert_close(images_at(model, Point(keep=0.5))(image), ranked(image))


def test_a_model_that_prunes_by_itself_does_so_in_no_tiles():
    tower = CLIP.tiny().image_tower
    model = model_of(PatchRankTower(tower, RankPredictor.for_tower(tower), 0.5, 1), 32, "patchrank")
    with pytest.raises(ValueError, match=r"--image-size 64: .* prunes by itself, and not in tiles; name"):
        at_size(model, 64)


def test_a_tower_that_was_trained_with_its_own_reducer_takes_no_other():
    model = model_of(DynamicViTTower(CLIP.tiny().image_tower), 32, "dynamicvit")
    with pytest.raises(ValueError, match="was trained with its own reducer, which no other replaces; give --keep"):
        images_at(model, Point("tome", 0.5, (0,)))


@pytest.mark.parametrize(("held", "reads"), [(0, 4), (2**20, 2)])
def test_pictures_that_fit_are_read_once(held, reads):
    """After the first batch was looked at, which is one more reading."""
    data, log = split_of()
    shown = Pictures(model_of(SigLIPShaped(), 16), data, SETTINGS, held=held)
    assert torch.equal(shown.first(2), pictures(8)[:2])
    passes = [torch.cat([batch["image"] for batch in shown]) for _ in range(3)]
    assert all(torch.equal(images, pictures(8)) for images in passes) and len(log) == reads


def test_pictures_that_do_not_fit_are_let_go_as_they_are_read():
    data, _ = split_of()
    shown = Pictures(model_of(SigLIPShaped(), 16), data, SETTINGS, held=pictures(4).nbytes)
    batches = iter(shown)
    first = weakref.ref(next(batches)["image"])
    assert first() is not None, "the second may fit as well"
    next(batches)
    assert first() is None


def test_a_timed_batch_is_full():
    data, _ = split_of(8)
    shown = Pictures(model_of(SigLIPShaped(), 16), data, SETTINGS)
    with pytest.raises(ValueError, match="8 pictures of test make no batch of 16, at which speed is to be"):
        shown.first(16)


def test_answers_are_packed_without_loss():
    correct = torch.tensor([True, False, True, True, False, False, False, True, True, False, True])
    assert packed(correct) == "b1a0" and torch.equal(unpacked("b1a0", 11), correct)


def test_working_memory_is_the_most_that_lives_at_once():
    weight = torch.ones(100, 100)

    def call():
        first = torch.ones(1000)  # 4,000 bytes
        second = first + 1
        del first
        third = (second.view(10, 100)[:5] @ weight).relu_()  # 2,000 bytes; a view and a change in place take nothing
        return third.sum()

    assert working_memory(call, "cpu") == 8000
