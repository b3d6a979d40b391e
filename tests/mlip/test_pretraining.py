"""The pretraining's terms against their functions, plain CLIP as the empty setting, and a short run of the Trainer."""

import math
from types import SimpleNamespace

import lightning
import pytest
import torch
from timm import create_model
from torch.nn import functional as F

from common.clip import CLIP
from common.contrastive import info_nce
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.pretraining import CLIPPretraining
from common.testing import TINY_CAPTIONS, tiny_architecture
from mlip import pretraining
from mlip.alignment import caption_mask, late_interaction, one_to_many, one_to_one
from mlip.declip import DeCLIPPretraining
from mlip.filip import FILIPPretraining
from mlip.pretraining import MLIPPretraining
from mlip.slip import SLIPPretraining

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
TINY = {"frequency_layers": 1, "keep_rates": {2: 0.5}, "warmup_steps": 2}
ALONE = {"frequency_weight": 0.0, "frequency_token_weight": 0.0, "spatial_token_weight": 0.0, "spatial_weight": 1.0}
PLAIN = {"frequency_layers": 0, "keep_rates": None, **ALONE}
TERMS = {"frequency": 0.15, "spatial": 0.65, "frequency_token": 0.1, "spatial_token": 0.1}  # α, β, γ, δ of section 4.1


@pytest.fixture
def make(tmp_path):
    """Makes a pretraining of the tiny CLIP's sizes."""
    architecture = tiny_architecture(tmp_path)

    def build(**options):
        torch.manual_seed(0)
        return MLIPPretraining(architecture, **{**TINY, **options})

    return build


def pairs():
    """Six captioned pictures; the last caption counts as the first."""
    generator = torch.Generator().manual_seed(1)
    text = CLIP.tiny().tokenizer([f"{caption} on the {caption}" for caption in TINY_CAPTIONS])
    ids = torch.tensor([0, 1, 2, 3, 4, 0])
    return {"image": torch.randn(6, 3, 32, 32, generator=generator), "text": text, "caption_id": ids}


def test_with_everything_off_it_is_plain_clip_pretraining(make, tmp_path):
    batch, ours = pairs(), make(**PLAIN)
    theirs = CLIPPretraining(tiny_architecture(tmp_path))
    ours.clip.load_state_dict(
        {key.replace("image_tower.", "image_tower.vit."): value for key, value in theirs.clip.state_dict().items()}
    )
    losses = [module.loss(batch) for module in (ours, theirs)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    gradients = {key.replace("image_tower.vit.", "image_tower."): p.grad for key, p in ours.clip.named_parameters()}
    for key, parameter in theirs.clip.named_parameters():
        torch.testing.assert_close(gradients.pop(key), parameter.grad, atol=1e-5, rtol=0)
    assert not gradients


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("frequency", ["one_to_many", "one_to_one", "filip"])
@pytest.mark.parametrize("spatial", ["one_to_many", "one_to_one", "filip"])
def test_the_loss_is_the_weighted_sum_of_its_terms(make, frequency, spatial, smoothing):
    """Equation 2 for every row of Table 7, and FILIP's loss in either place."""
    module, batch = make(frequency_matching=frequency, spatial_matching=spatial, label_smoothing=smoothing), pairs()
    features = module.clip.image_tower(batch["image"])
    text, tokens = module.clip.text_tower(batch["text"], return_tokens=True)
    mask, text, scale = caption_mask(batch["text"]), F.normalize(text, dim=-1), module.clip.logit_scale.exp()
    contrastive = {"same": batch["caption_id"], "label_smoothing": smoothing}

    def aligned(matching, image_tokens):
        if matching == "filip":
            return late_interaction(image_tokens, tokens, mask, scale, **contrastive)
        return {"one_to_many": one_to_many, "one_to_one": one_to_one}[matching](image_tokens, tokens, mask)

    expected = {
        "frequency": info_nce(F.normalize(features.frequency, dim=-1), text, scale, **contrastive),
        "spatial": info_nce(F.normalize(features.spatial, dim=-1), text, scale, **contrastive),
        "frequency_token": aligned(frequency, features.frequency_tokens),
        "spatial_token": aligned(spatial, features.spatial_tokens),
    }
    terms = module.losses(batch)
    assert terms.keys() == TERMS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-5)
    total = sum(TERMS[name] * value for name, value in expected.items())
    torch.testing.assert_close(module.loss(batch), total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("off", ["frequency", "frequency_token", "spatial_token"])
def test_a_term_without_weight_is_not_computed(make, off, monkeypatch):
    module = make(**{f"{off}_weight": 0.0})
    assert module.losses(pairs()).keys() == TERMS.keys() - {off}
    monkeypatch.setattr(pretraining, "one_to_one", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(pretraining, "one_to_many", lambda *_: pytest.fail("computed"))
    module = make(frequency_token_weight=0.0, spatial_token_weight=0.0)
    assert module.losses(pairs()).keys() == {"frequency", "spatial"}
    head = make(frequency_weight=0.0, frequency_token_weight=0.0).clip.image_tower.frequency_head
    assert not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize("name", [*TERMS, "neighbour", "masking"])
def test_every_term_moves_what_it_is_about(make, name):
    module = make(neighbour_weight=0.2, neighbour_queue=8, masking_weight=0.2, guide="random")
    module.losses(pairs())[name].backward()
    moved = {key for key, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    tower = "clip.image_tower."
    assert ({f"{tower}fourier.0.filter.pieces", f"{tower}vit.conv1.weight"} <= moved) == (name != "masking")
    assert ({"masked.head.weight", "masked.mask_embedding"} <= moved) == (name == "masking")
    assert (f"{tower}frequency_head.1.weight" in moved) == name.startswith("frequency")
    spatial = name not in ("frequency", "frequency_token", "masking")
    assert (f"{tower}vit.transformer.resblocks.0.attn.in_proj_weight" in moved) == spatial
    assert ("clip.text_tower.token_embedding.weight" in moved) == (name != "neighbour")
    assert ("clip.logit_scale" in moved) == (not name.endswith("token") and name != "masking")
    assert not any(".guide.vit." in key for key in moved)  # frozen unless train_guide says otherwise


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_neighbours_are_looked_for_in_earlier_batches(make, smoothing):
    options = {"neighbour_weight": 0.2, "neighbour_queue": 8, "neighbour_form": "symmetric"}
    module, batch = make(**options, label_smoothing=smoothing), pairs()
    nothing = smoothing * math.log(6)  # what smoothing costs where all six candidates are alike
    assert float(module.losses(batch)["neighbour"].detach()) == pytest.approx(nothing, abs=1e-6)
    assert module.neighbours.seen == 6
    module.eval()
    image, text = module(batch["image"], batch["text"])
    place = (text @ module.neighbours.queue[:6].T).argmax(1)
    neighbours, scale = module.neighbours.queue[place], module.clip.logit_scale.exp()
    expected = info_nce(image, neighbours, scale, same=place, label_smoothing=smoothing)
    torch.testing.assert_close(module.losses(batch)["neighbour"], expected, atol=1e-5, rtol=1e-5)


def test_label_smoothing_can_grow_over_the_training(make):
    options = {"neighbour_weight": 0.2, "neighbour_queue": 8}
    module = make(**options, label_smoothing=0.2, smoothing_grows=True).eval()  # which leaves the queue as it is
    assert module.smoothing() == 0.2  # outside a training: what it grows to
    for step, share in ((0, 0.0), (25, 0.05), (100, 0.2)):
        module.trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=100)
        assert module.smoothing() == pytest.approx(share)
        expected = make(**options, label_smoothing=share).losses(pairs())
        torch.testing.assert_close(module.losses(pairs()), expected)


def test_a_guide_learns_where_its_recipe_says_so(make):
    module = make(guide="random", train_guide=True)
    module.loss(pairs()).backward()
    learning = [p for name, p in module.named_parameters() if ".guide.vit." in name]
    assert len(learning) > 100 and all(p.requires_grad and p.grad is not None for p in learning)


@pytest.mark.parametrize("training", [MLIPPretraining, SLIPPretraining, DeCLIPPretraining, FILIPPretraining])
def test_every_training_says_the_heads_of_a_guide_whose_file_does_not(training, tmp_path):
    torch.save(create_model("deit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "deit.pth")
    options = {"frequency_layers": 0, "keep_rates": {2: 0.5}, "guide": str(tmp_path / "deit.pth")}
    options |= ALONE if training is MLIPPretraining else {}
    with pytest.raises(ValueError, match="say guide_heads 12 for the light MAE encoder"):
        training(architecture=tiny_architecture(tmp_path), **options)
    module = training(architecture=tiny_architecture(tmp_path), **options, guide_heads=3)
    clip = module.clip.clip if training is FILIPPretraining else module.clip
    assert clip.image_tower.guide.sizes["heads"] == module.hparams.guide_heads == 3


@pytest.fixture
def teacher(tmp_path):
    """A CLIP's weights, as a model and as a file."""
    clip = CLIP.tiny()
    with torch.no_grad():
        clip.logit_scale.fill_(3.0)
    clip.save(tmp_path / "teacher.safetensors")
    return clip, str(tmp_path / "teacher.safetensors")


def test_the_text_side_can_start_from_a_trained_clip(make, teacher):
    teacher, file = teacher
    module = make(weights=file)
    for key, value in teacher.text_tower.state_dict().items():
        assert torch.equal(module.clip.text_tower.state_dict()[key], value)
    assert module.clip.logit_scale == 3.0 and module.clip.logit_scale.requires_grad
    vit, theirs = module.clip.image_tower.vit, teacher.image_tower
    assert not torch.equal(vit.conv1.weight, theirs.conv1.weight)


@torch.no_grad()
def test_so_can_the_last_layers_of_the_image_side(make, teacher):
    teacher, file = teacher
    images, tower = pairs()["image"], teacher.image_tower
    whole = make(**PLAIN, weights=file, image_layers=2).clip  # both of its layers
    torch.testing.assert_close(whole.encode_image(images), teacher.encode_image(images), atol=1e-5, rtol=0)
    for options in ({}, PLAIN):  # with a Fourier block in the first layer's place, and with a new layer there
        module = make(**options, weights=file, image_layers=1)
        vit, x = module.clip.image_tower.vit, torch.randn(2, 17, 64)
        torch.testing.assert_close(vit.embed(images), tower.embed(images))
        torch.testing.assert_close(vit.transformer.resblocks[-1](x), tower.transformer.resblocks[-1](x))
        torch.testing.assert_close(vit.pool(x), tower.pool(x))
    first, theirs = vit.transformer.resblocks[0], tower.transformer.resblocks[0]
    assert not torch.equal(first.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
    with pytest.raises(ValueError, match="2 layers to start from: the Spatial Stage has 1"):
        make(weights=file, image_layers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_token_weight": -0.1}, "spatial_token_weight -0.1 is negative"),
        ({"spatial_weight": 0.0}, "spatial_weight 0 would leave the embedding"),
        ({"frequency_layers": 0}, "frequency_weight 0.15 without Fourier blocks"),
        ({"spatial_matching": "hungarian"}, "spatial_matching 'hungarian' is none of one_to_many, one_to_one, filip"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0 is not in"),
        ({"image_layers": 1}, "image_layers 1 without weights"),
        ({"neighbour_weight": 0.2, "neighbour_queue": 0}, "a queue of 0 captions"),
        ({"guide": "nowhere.pth"}, r"the Guide nowhere.pth: no weights at .*nowhere.pth; name a DeiT-Tiny"),
        ({"guide": "${NO_GUIDE_HERE}/a.pth"}, "set the environment variable NO_GUIDE_HERE to a DeiT-Tiny"),
    ],
)
def test_senseless_settings_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


class LabelledShards(ShardDataModule):
    """Shards whose labels are the captions' places."""

    @property
    def class_prompts(self):
        return list(TINY_CAPTIONS)


@pytest.fixture
def data(tmp_path):
    """Twelve noise pictures under six captions, labelled by them."""
    captions = [caption.encode() for caption in TINY_CAPTIONS]
    pattern = write_shards(
        tmp_path / "shards", 2, 6, txt=lambda n: captions[n % 6], json=lambda n: f'{{"label": {n % 6}}}'.encode()
    )
    return LabelledShards(
        pattern, pattern, architecture=tiny_architecture(tmp_path), global_batch_size=6, num_workers=0, seed=1
    )


@pytest.mark.filterwarnings("ignore")
def test_a_short_run_logs_its_terms_and_leaves_a_plain_checkpoint(make, data, tmp_path):
    lightning.seed_everything(0, verbose=False)
    module = make(neighbour_weight=0.2, neighbour_queue=16, guide="random", learning_rate=1e-3)
    with torch.no_grad():
        module.clip.logit_scale.fill_(9.0)
    trainer = lightning.Trainer(max_steps=6, gradient_clip_val=1.0, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in (*TERMS, "neighbour"):
        assert math.isfinite(metrics[f"train_{name}_loss"])
    assert {"train_loss", "val_top1", "val_image_to_text_r1", "val_text_to_image_r1"} <= metrics.keys()
    assert module.clip.logit_scale <= math.log(100) + 1e-6
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = MLIPPretraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    images = pairs()["image"]
    with torch.no_grad():
        assert torch.equal(again.clip.encode_image(images), module.eval().clip.encode_image(images))
    assert torch.equal(again.neighbours.queue, module.neighbours.queue) and again.neighbours.seen == 36


@pytest.mark.parametrize(
    ("set_up", "ignored"),
    [
        ({"guide_heads": 7}, "guide_heads 7 is ignored: nothing reads it while guide is not set"),
        ({"guide": "random", "guide_heads": 7}, "guide_heads 7 is ignored: a random guide has"),
        ({**PLAIN, "pieces": 4}, "pieces 4 is ignored"),
        ({"smoothing_grows": True}, "smoothing_grows True is ignored"),
        ({"frequency_token_weight": 0.0, "frequency_matching": "filip"}, "frequency_matching 'filip' is ignored"),
    ],
)
def test_a_setting_that_nothing_reads_is_named(make, set_up, ignored):
    with pytest.warns(UserWarning, match=ignored):
        make(**set_up)


@pytest.mark.filterwarnings("error")
def test_settings_that_are_read_need_no_word(make):
    make(pieces=4, label_smoothing=0.1, smoothing_grows=True, frequency_matching="one_to_one")


@pytest.mark.parametrize("training", [MLIPPretraining, SLIPPretraining])
def test_weights_that_do_not_record_their_activation_are_told_it(tmp_path, training):
    architecture, file = tiny_architecture(tmp_path), tmp_path / "weights.pt"
    start = CLIP.from_open_clip(architecture, quick_gelu=True)
    torch.save(start.state_dict(), file)
    options = {"weights": str(file), "preprocess": "clip", "frequency_layers": 0}
    if training is MLIPPretraining:
        options |= PLAIN
    with pytest.raises(ValueError, match="does not record its activation"):
        training(architecture=architecture, **options)
    module = training(architecture=architecture, quick_gelu=True, **options)
    ids = pairs()["text"]
    torch.testing.assert_close(module.clip.encode_text(ids), start.encode_text(ids))
    assert module.clip.quick_gelu


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plain", [False, True])
def test_accumulation_is_refused_with_the_reason(make, data, tmp_path, plain):
    module = CLIPPretraining(tiny_architecture(tmp_path), warmup_steps=2) if plain else make()
    trainer = lightning.Trainer(max_steps=4, accumulate_grad_batches=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="accumulate_grad_batches 2 would not make a batch 2 times as large"):
        trainer.fit(module, data)
