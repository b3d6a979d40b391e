"""What holds for every reducer on the list: its count, its independence of the batch, its places, export, gradients."""

import pytest
import torch

import mlip.merging  # noqa: F401  (puts its reducer on the list)
import patchrank.reducers  # noqa: F401
from common.flops import count_macs
from common.reducer_registry import NEEDS, REDUCERS, Setting, at, named
from common.reduction import ReducedTower
from common.tower import ImageTower
from patchrank.reducers.base import Call
from waveclip import WaveTower
from waveclip.reduced import ReducedWaveTower

TOWER = {"image_size": 8, "patch_size": 2, "width": 16, "layers": 3, "heads": 2, "embed_dim": 8}
PATCHES, GRID, LAYER = 16, 4, 1
TEXTS = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
each = pytest.mark.parametrize("name", sorted(REDUCERS))


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    built = ImageTower(**TOWER).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():  # biases too
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def images(count=3):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rate_of(name):
    return REDUCERS[name].rate(0.5)


def trained(name, tower):
    """Stand-ins for the modules of a reducer that is trained."""
    make = REDUCERS[name].untrained
    torch.manual_seed(0)
    return make and make(TOWER["width"], len(tower.transformer.resblocks), PATCHES).to(tower.proj.dtype)


def reducers(name, tower, keep=None):
    keep = rate_of(name) if keep is None else keep
    blocks = len(tower.transformer.resblocks)
    setting = Setting(keep, LAYER, PATCHES, blocks, GRID, tower, trained(name, tower), texts=TEXTS)
    return REDUCERS[name].reducers(setting)


def closed_form(tower, places):
    """Multiply-adds of one picture: the embedding, blocks on the tokens that are left, reducers, and the readout."""
    width, heads, embed = TOWER["width"], TOWER["heads"], TOWER["embed_dim"]
    patches, total = PATCHES, 3 * 2 * 2 * width * PATCHES + 5 * width * (PATCHES + 1)
    for block in range(TOWER["layers"]):
        for half in ("before", "middle", "after"):
            reducer = places.get(at(block, half))
            if half == "middle":
                tokens = patches + 1
                total += (5 * width + 4 * width**2) * tokens + 2 * width * tokens**2
            if half == "after":
                total += (5 * width + 8 * width**2) * (patches + 1)
            if reducer is not None:
                total += reducer.macs(Call(patches, 1, width, heads, ran=half != "before", embed_dim=embed))
                patches = reducer.left(patches)
    return total + 5 * width * (patches + 1) + width * embed


@each
def test_its_multiply_adds_have_a_closed_form(name, tower):
    places = reducers(name, tower)
    counted = count_macs(ReducedTower(tower, places), images(1)).gmacs
    assert round(1e9 * counted) == closed_form(tower, places)


@each
@torch.no_grad()
def test_it_removes_tokens_and_a_pictures_answer_does_not_depend_on_its_batch(name, tower):
    reduced = ReducedTower(tower, reducers(name, tower))
    together = reduced(images())
    x, context = reduced.run(images())
    assert together.isfinite().all() and x.shape[1] < 1 + 0.7 * PATCHES
    assert context.positions.shape[1] == x.shape[1] - 1 and context.positions.max() < PATCHES
    if "batch" in REDUCERS[name].exceptions:
        assert not torch.allclose(reduced(images()), together)
        return
    for row in range(3):
        torch.testing.assert_close(reduced(images()[row : row + 1])[0], together[row])


@each
@torch.no_grad()
def test_it_stands_before_in_the_middle_of_and_after_a_block(name, tower):
    """Before the first block, and behind a reducer that gave tokens sizes and later attention a bias."""
    reducer = next(iter(reducers(name, tower).values()))
    for place in (0, (1, "middle"), (1, "after")):
        assert ReducedTower(tower, {place: reducer})(images()).isfinite().all()
    if "grid" not in REDUCERS[name].needs:
        merged = named("tome").cls(4)
        x, context = ReducedTower(tower, {(0, "middle"): merged, 2: reducer}).run(images())
        assert x.isfinite().all() and x.shape[1] == 1 + reducer.left(PATCHES - 4)
        assert context.bias.shape == (3, 1, 1, x.shape[1]) and context.sizes.shape[1] == x.shape[1] - 1


@each
@torch.no_grad()
def test_keeping_everything_changes_nothing(name, tower):
    if "identity" in REDUCERS[name].exceptions:
        assert REDUCERS[name].exceptions["identity"]
        return
    reduced = ReducedTower(tower, reducers(name, tower, keep=1.0))
    torch.testing.assert_close(reduced(images(2)), tower(images(2)))


@each
@torch.no_grad()
def test_its_shapes_are_static(name):
    """It runs on tensors without values, so no shape depends on them."""
    with torch.device("meta"):
        empty = ImageTower(**TOWER)
    x, _ = ReducedTower(empty, reducers(name, empty)).to("meta").run(images().float().to("meta"))
    assert x.shape[1] < 1 + 0.7 * PATCHES


@each
@torch.no_grad()
def test_it_is_exported_as_one_graph_for_any_number_of_pictures(name):
    """Nothing of the example's pictures is left in the graph: it is right for others, and for more of them."""
    torch.manual_seed(0)
    tower = ImageTower(**TOWER | {"layers": 2}).double().eval()
    reduced = ReducedTower(tower, reducers(name, tower))
    any_number = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(reduced, (images(2),), dynamic_shapes=any_number).module()
    z, expected = exported(images(5)), reduced(images(5))
    if "batch" in REDUCERS[name].exceptions:
        assert z.shape == expected.shape and z.isfinite().all()
        return
    torch.testing.assert_close(z, expected)


@each
def test_gradients_flow_through_the_tokens_that_are_left(name, tower):
    torch.manual_seed(0)
    pictures = images(1).requires_grad_()
    ReducedTower(tower, reducers(name, tower))(pictures).square().sum().backward()
    assert pictures.grad.isfinite().all() and (pictures.grad != 0).any()


@each
@torch.no_grad()
def test_it_works_in_a_level_of_a_waveclip_beside_its_cache(name, tower):
    torch.manual_seed(0)
    wave = WaveTower.from_image_tower(tower, 1).eval()
    entry, patches = REDUCERS[name], wave.tokens_in(1) - 1
    setting = Setting(rate_of(name), LAYER, patches, TOWER["layers"], 0, wave, trained(name, tower), texts=TEXTS)
    if "levels" in entry.exceptions:
        reasons = "needs every patch of a square grid|reads (where patches stand|the pixels)"
        with pytest.raises(ValueError, match=reasons):
            entry.reducers(setting)
        return
    coarse, fine = ReducedWaveTower(wave, {1: entry.reducers(setting)})(images())
    torch.testing.assert_close(coarse, wave(images())[0])
    assert fine.isfinite().all() and (fine - wave(images())[1]).abs().max() > 1e-6


def test_every_entry_says_what_its_reader_needs_to_know():
    for entry in REDUCERS.values():
        assert entry.source and entry.licence and entry.cls.__doc__ and set(entry.needs) <= set(NEEDS)
        assert set(entry.exceptions) <= {"batch", "identity", "levels"}


def test_a_trained_reducer_is_refused_without_its_modules(tower):
    with pytest.raises(ValueError, match="dynamicvit is trained, and a plain tower has not learned it; open a model"):
        named("dynamicvit").reducers(Setting(0.5, LAYER, PATCHES, TOWER["layers"], GRID, tower))


def test_a_reducer_is_refused_without_what_it_reads(tower):
    with pytest.raises(ValueError, match="zoo-prune reads the tower's output; give the tower"):
        named("zoo-prune").reducers(Setting(0.5, LAYER, PATCHES, TOWER["layers"], GRID))
    with pytest.raises(ValueError, match="by the classes' texts, so a picture has no embedding of its own; classify"):
        named("recoverable-compression").reducers(Setting(0.5, LAYER, PATCHES, TOWER["layers"], GRID, tower))


def test_a_reducer_of_one_keep_rate_alone_says_which(tower):
    half = named("half-resolution")
    assert (half.rate(0.9), named("tome").rate(0.9)) == (0.25, 0.9)
    with pytest.raises(ValueError, match=r"half-resolution keeps 0\.25 of the patches, never 0\.9; give keep 0\.25"):
        half.reducers(Setting(0.9, LAYER, PATCHES, TOWER["layers"], GRID, tower))


def test_a_name_that_is_not_there_lists_those_that_are():
    with pytest.raises(
        ValueError, match=r"no reducer 'divprun'; did you mean divprune\? there are atc, ats, centre-crop"
    ):
        named("divprun")
