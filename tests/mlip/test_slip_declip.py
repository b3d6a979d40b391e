"""SLIP and DeCLIP: each term of a batch against its own computation, and short runs of the recipes."""

import math

import pytest
import torch
import yaml
from torch.nn import functional as F

from common.cli import main
from common.clip import CLIP
from common.self_supervision import simclr
from common.testing import TINY_CAPTIONS, tiny_architecture
from mlip.declip import DeCLIPPretraining
from mlip.slip import SLIPPretraining
from tests.readme import ROOT

SLIP = {"hidden_width": 12, "projection_width": 6}
DECLIP = {"neighbour_queue": 8}


@pytest.fixture
def make(tmp_path):
    """Makes a training of the tiny CLIP's sizes."""
    architecture = tiny_architecture(tmp_path)

    def build(training, **options):
        torch.manual_seed(0)
        return training(architecture=architecture, warmup_steps=2, **options)

    return build


def pairs(views, count=6):
    """Captioned pictures with further views, and the captions once more in another order of words."""
    generator = torch.Generator().manual_seed(1)
    tokenizer = CLIP.tiny().tokenizer
    pictures = [torch.randn(count, 3, 32, 32, generator=generator) for _ in range(1 + views)]
    return {
        "image": pictures[0],
        "image_views": pictures[1:],
        "text": tokenizer([f"{caption} on the dog" for caption in TINY_CAPTIONS[:count]], longest=True),
        "text_view": tokenizer([f"the dog on {caption}" for caption in TINY_CAPTIONS[:count]], longest=True),
        "caption_id": torch.arange(count),
    }


def cross_entropy(image, text, scale, smoothing):
    """Symmetric InfoNCE by loops over unit rows; a share of each target is spread over all candidates."""
    terms = []
    for rows, columns in ((image, text), (text, image)):
        for place, row in enumerate(rows):
            mass = [math.exp(float(scale * (row @ column))) for column in columns]
            spread = sum(math.log(m / sum(mass)) for m in mass) / len(mass)
            terms.append(-(1 - smoothing) * math.log(mass[place] / sum(mass)) - smoothing * spread)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@torch.no_grad()
def test_slips_terms(make, smoothing):
    module, batch = make(SLIPPretraining, **SLIP, label_smoothing=smoothing), pairs(2)
    terms = module.losses(batch)
    clip = module.clip
    scale = clip.logit_scale.exp()
    expected = cross_entropy(clip.encode_image(batch["image"]), clip.encode_text(batch["text"]), scale, smoothing)
    assert float(terms["clip"]) == pytest.approx(expected, rel=1e-4)
    vit, projections = clip.image_tower.vit, []
    for view in batch["image_views"]:
        x = vit.ln_post(vit.run_blocks(vit.embed(view)))[:, 0]  # before CLIP's projection
        for layer in (0, 3):
            x = module.projector[layer](x)
            x = F.relu((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())
        projections.append(module.projector[6](x))
    torch.testing.assert_close(terms["simclr"], simclr(*projections), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.loss(batch), terms["clip"] + terms["simclr"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@torch.no_grad()
def test_declips_terms(make, monkeypatch, smoothing):
    module, batch = make(DeCLIPPretraining, **DECLIP, label_smoothing=smoothing), pairs(1)
    chosen = torch.zeros_like(batch["text"], dtype=torch.bool)
    chosen[:, 2] = True
    corrupted = batch["text"].masked_fill(chosen, module.masked.mask_id)
    monkeypatch.setattr(module.masked, "corrupt", lambda ids: (corrupted, chosen))
    queue = module.neighbours.queue.clone()
    terms = module.losses(batch)

    clip, tower = module.clip, module.clip.text_tower
    raw = [clip.encode_image(view, normalize=False) for view in (batch["image"], *batch["image_views"])]
    images, scale = [F.normalize(view, dim=-1) for view in raw], clip.logit_scale.exp()
    hidden = module.masked.hidden(tower, corrupted)
    plain = hidden[torch.arange(6), batch["text"].argmax(1)] @ tower.text_projection  # of the corrupted caption
    texts = [F.normalize(plain, dim=-1), clip.encode_text(batch["text_view"])]
    expected = sum(cross_entropy(image, text, scale, smoothing) for image in images for text in texts) / 4
    assert float(terms["clip"]) == pytest.approx(expected, rel=1e-4)

    losses = []
    for text in texts:
        neighbours = queue[(text @ queue.T).argmax(1)]
        logits = [scale * image @ neighbours.T for image in images]
        losses += [F.cross_entropy(rows, torch.arange(6), label_smoothing=smoothing) for rows in logits]
    torch.testing.assert_close(terms["neighbour"], sum(losses) / 4, atol=1e-4, rtol=1e-4)
    newest = torch.cat([texts[1], texts[0]])[-8:]  # the rewritten captions enter first
    stored = {tuple(row) for row in module.neighbours.queue.round(decimals=4).tolist()}
    assert stored == {tuple(row) for row in newest.round(decimals=4).tolist()}

    torch.testing.assert_close(terms["simsiam"], module.simsiam(*raw), atol=1e-4, rtol=1e-4)
    logits = module.masked.head(hidden[:, 2])
    torch.testing.assert_close(terms["masking"], F.cross_entropy(logits, batch["text"][:, 2]), atol=1e-4, rtol=1e-4)
    weights = {"clip": 0.4, "neighbour": 0.2, "simsiam": 0.2, "masking": 0.2}
    assert module.weights == weights and terms.keys() == weights.keys()


@torch.no_grad()
def test_evaluation_leaves_declips_queue_as_it_is(make):
    module = make(DeCLIPPretraining, **DECLIP).eval()
    before = module.neighbours.queue.clone()
    module.losses(pairs(1))
    assert torch.equal(module.neighbours.queue, before) and module.neighbours.seen == 0


@pytest.mark.parametrize("off", ["neighbour", "simsiam", "masking"])
def test_a_term_of_declip_can_be_left_out(make, off):
    module = make(DeCLIPPretraining, **DECLIP, **{f"{off}_weight": 0.0})
    assert module.losses(pairs(1)).keys() == {"clip", "neighbour", "simsiam", "masking"} - {off}


@pytest.mark.parametrize(("training", "options", "views"), [(SLIPPretraining, SLIP, 2), (DeCLIPPretraining, DECLIP, 1)])
def test_every_parameter_learns_and_a_batch_in_parts_is_the_same(make, training, options, views):
    gradients = []
    for parts in (1, 2):
        module = make(training, **options, parts=parts)
        torch.manual_seed(3)  # of the masked words
        module.loss(pairs(views)).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
        assert not [name for name, gradient in gradients[-1].items() if gradient is None]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("training", "options", "message"),
    [
        (SLIPPretraining, {"simclr_weight": 0.0}, "simclr_weight 0.0 must be positive"),
        (SLIPPretraining, {"temperature": -0.1}, "temperature -0.1 must be positive"),
        (DeCLIPPretraining, {"clip_weight": 0.0}, "clip_weight 0.0 must be positive"),
        (DeCLIPPretraining, {"simsiam_weight": -1.0}, "simsiam_weight -1.0 is negative"),
    ],
)
def test_senseless_settings_are_refused(make, training, options, message):
    with pytest.raises(ValueError, match=message):
        make(training, **options)


def test_missing_views_are_said_with_the_setting_that_makes_them(make):
    slip, declip, batch = make(SLIPPretraining, **SLIP), make(DeCLIPPretraining, **DECLIP), pairs(1)
    with pytest.raises(ValueError, match=r"SLIP reads 2 further views .* image_views: \[mocov2, mocov2\]"):
        slip.losses(batch)
    with pytest.raises(ValueError, match="text_view: eda"):
        declip.losses({name: value for name, value in batch.items() if name != "text_view"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["slip", "declip", "filip"])
def test_the_smoke_overlay_trains_the_plain_tower_of_a_baseline(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    assert main(["fit", "-c", f"mlip/{name}.yaml", "-c", "mlip/smoke.yaml"]) == 0
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert "frequency_weight" not in saved["hyper_parameters"]  # only what the class takes
    tower = {key.partition("image_tower.")[2] for key in saved["state_dict"] if "image_tower." in key}
    assert "vit.class_embedding" in tower and {key.partition(".")[0] for key in tower} == {"vit"}


def stated(*files):
    """The model's and the data's settings of a recipe under overlays."""
    contents = [yaml.safe_load((ROOT / f"mlip/{file}.yaml").read_text()) for file in files]
    model, data = {}, {}
    for content in contents:
        model |= content["model"]["init_args"]
        data |= content.get("data", {}).get("init_args", {})
    return model, data


@pytest.mark.parametrize("name", ["slip", "declip", "filip"])
def test_recipes_state_cui_and_others_settings(name):
    model, data = stated(name)
    assert model["learning_rate"] == {"slip": 5e-4, "declip": 1e-3, "filip": 5e-4}[name]
    assert model["weight_decay"] == {"slip": 0.5, "declip": 0.1, "filip": 0.5}[name]
    assert model["warmup_steps"] == 2500
    assert data.get("image_views", []) == ["mocov2"] * {"slip": 2, "declip": 1, "filip": 0}[name]
    assert data["augmentation"] == {"slip": "slip", "declip": "mocov2", "filip": "mocov2"}[name]


@pytest.mark.parametrize("name", ["slip", "slip_cc3m", "declip", "declip_cc3m", "filip"])
def test_a_baseline_may_have_mlips_rate_decay_and_warm_up(name):
    shared = ("learning_rate", "weight_decay", "warmup_steps")
    (baseline, data), (mlip, _) = stated(name, "as_mlip"), stated("yfcc15m")
    assert [baseline[key] for key in shared] == [mlip[key] for key in shared]
    assert data == stated(name)[1]


@pytest.mark.parametrize("training", [SLIPPretraining, DeCLIPPretraining])
def test_a_checkpoint_remembers_how_pictures_were_prepared(training, tmp_path):
    clip = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    module = training(architecture=tiny_architecture(tmp_path), preprocess=clip, warmup_steps=1)
    assert module.clip.preprocess.mean == (0.5, 0.5, 0.5)
    assert module.hparams.preprocess == module.clip.architecture["preprocess_cfg"]
