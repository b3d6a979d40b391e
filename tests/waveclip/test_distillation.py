"""The losses against their formulas, what trains and what does not, and a short run of the Trainer."""

import json
import math

import lightning
import pytest
import torch
from torch.nn import functional as F

from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.dev_run import DevRun
from common.testing import TINY_CAPTIONS, tiny_architecture
from waveclip import WaveCLIPDistillation

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
PLACES = 4  # cells of the coarse grid: 32 px, patch 8, one level


@pytest.fixture
def make(tmp_path):
    """Makes a module whose logged values stand in ``logged``, and a batch of six captioned pictures."""
    architecture = tiny_architecture(tmp_path)

    def build(**options):
        torch.manual_seed(0)
        module = WaveCLIPDistillation(architecture, **options)
        module.logged = {}
        module.log = lambda name, value, **_: module.logged.update({name: value.detach()})
        module.log_dict = lambda values: [module.log(*item) for item in values.items()]
        text = module.teacher.tokenizer(list(TINY_CAPTIONS[:6]))
        ids = torch.tensor([0, 1, 2, 3, 4, 0])  # the last caption counts as the first
        return module, {"image": torch.randn(6, 3, 32, 32), "text": text, "caption_id": ids}

    return build


def embeddings(module, batch):
    """Unit vectors: the student's levels, the teacher's target and its texts."""
    with torch.no_grad():
        levels = [F.normalize(z, dim=-1) for z in module(batch["image"])]
        return levels, module.teacher.encode_image(batch["image"]), module.teacher.encode_text(batch["text"])


def cosine_terms(levels, target):
    """1 - cos of each level, mean over the pictures."""
    return [1 - (z * target).sum(-1).mean() for z in levels]


def test_the_plain_loss_is_the_cosine_distance_averaged_over_levels(make):
    module, batch = make(levels=2)
    levels, target, _ = embeddings(module, batch)
    expected = torch.stack(cosine_terms(levels, target)).mean()
    torch.testing.assert_close(module.training_step(batch, 0).detach(), expected)
    assert module.logged.keys() == {"train_cosine", "train_loss"}


def test_larger_pictures_have_room_for_another_level(make):
    module, _ = make(levels=2, image_size=64)
    assert [module.wave.tokens_in(step) for step in range(3)] == [1 + 2 * 2, 1 + 3 * 2 * 2, 1 + 3 * 4 * 4]
    assert len(module(torch.randn(2, 3, 64, 64))) == 3
    with pytest.raises(ValueError, match="image_size 72 with patch_size 8 and levels 2 needs a multiple of 32"):
        make(levels=2, image_size=72)


def test_fine_first_counts_the_last_level_alone(make):
    module, batch = make(fine_first_steps=1, distribution_weight=1.0)
    levels, target, texts = embeddings(module, batch)
    module.training_step(batch, 0)
    torch.testing.assert_close(module.logged["train_cosine"], cosine_terms(levels, target)[-1])
    p, q = ((module.teacher.logit_scale.exp() * z @ texts.T).softmax(-1) for z in (target, levels[-1]))
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(module.logged["train_distribution"], expected, atol=1e-5, rtol=1e-4)


def test_what_is_predicted_and_deployed_is_the_students(make):
    module, batch = make()
    levels, _, _ = embeddings(module, batch)
    with torch.no_grad():
        predicted = module.predict_step(batch | {"key": list("abcdef")}, 0)
    torch.testing.assert_close(predicted["embedding"], levels[-1])
    tower, text_model = module.deployable()
    assert predicted["key"] == list("abcdef") and tower is module.wave and text_model is module.teacher


def test_the_distribution_term_is_the_divergence_over_the_captions(make):
    module, batch = make(distribution_weight=0.5)
    levels, target, texts = embeddings(module, batch)
    scale = module.teacher.logit_scale.exp()
    p = (scale * target @ texts.T).softmax(-1)
    q = [(scale * z @ texts.T).softmax(-1) for z in levels]
    expected = torch.stack([(p * (p / one).log()).sum(-1).mean() for one in q]).mean()
    loss = module.training_step(batch, 0).detach()
    torch.testing.assert_close(module.logged["train_distribution"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, module.logged["train_cosine"] + 0.5 * expected, atol=1e-5, rtol=1e-4)


def test_the_contrastive_term_takes_equal_captions_together(make):
    module, batch = make(contrastive_weight=2.0)
    levels, _, texts = embeddings(module, batch)
    same = batch["caption_id"][:, None] == batch["caption_id"]
    expected = []
    for z in levels:
        odds = (module.teacher.logit_scale.exp() * z @ texts.T).exp()
        expected += [-((side * same).sum(1) / side.sum(1)).log().mean() for side in (odds, odds.T)]
    expected = torch.stack(expected).mean()
    loss = module.training_step(batch, 0).detach()
    torch.testing.assert_close(module.logged["train_contrastive"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, module.logged["train_cosine"] + 2 * expected, atol=1e-5, rtol=1e-4)


def test_where_there_are_classes_the_text_terms_read_their_prompts(make):
    module, batch = make(contrastive_weight=2.0, distribution_weight=1.0, distribution_scale=3.0)
    levels, target, texts = embeddings(module, batch)
    classes, labels = texts[:5], batch["caption_id"]
    module._train_classes, batch["label"] = classes, labels
    scale = module.teacher.logit_scale.exp()
    right = [(scale * z @ classes.T).softmax(-1)[range(6), labels] for z in levels]
    p, *q = ((3 * scale * z @ classes.T).softmax(-1) for z in (target, *levels))
    module.training_step(batch, 0)
    expected = {
        "train_contrastive": torch.stack([-one.log().mean() for one in right]).mean(),
        "train_distribution": torch.stack([(p * (p / one).log()).sum(-1).mean() for one in q]).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(module.logged[name], value, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_token_term_compares_places(make):
    module, batch = make(token_weight=3.0)
    images, tower = batch["image"], module.teacher.image_tower
    student = module.wave.run_blocks(module.wave.embed(images), mask=module.wave.mask)
    teacher = tower.run_blocks(tower.embed(images))
    distances = []
    for place in range(PLACES):
        row, column = divmod(place, 2)
        # The class tokens stand at 0 and 5; the teacher's grid is 4 x 4 behind its class token.
        student_mean = student[:, [1 + place] + [6 + band * PLACES + place for band in range(3)]].mean(1)
        patches = [1 + 4 * (2 * row + i) + 2 * column + j for i in range(2) for j in range(2)]
        distances.append(1 - F.cosine_similarity(student_mean, teacher[:, patches].mean(1)))
    expected = torch.stack(distances).mean()
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(module.logged["train_token"], expected)
    torch.testing.assert_close(loss, module.logged["train_cosine"] + 3 * expected)


def test_what_trains_is_all_or_new(make):
    with pytest.raises(ValueError, match="train 'tokenizer' is neither all nor new"):
        make(train="tokenizer")


def test_new_parameters_alone_leave_muon_nothing(make):
    with pytest.raises(ValueError, match="train new leaves optimizer muon no matrices of blocks to train"):
        make(train="new", optimizer="muon")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("setting", "mend"),
    [
        ("distribution_weight", "0 leaves the term out"),
        ("contrastive_weight", "0 leaves the term out"),
        ("token_weight", "0 leaves the term out"),
        ("distribution_scale", "1 keeps the teacher's scale"),
        ("detail_scale", "1 keeps the teacher's filter"),
        ("new_rate_factor", "1 takes the others' rate"),
    ],
)
def test_a_factor_that_trains_nothing_sensible_is_refused(make, setting, value, mend):
    with pytest.raises(ValueError, match=rf"{setting} {value} must be finite and .*; {mend}"):
        make(**{setting: value})


@pytest.mark.parametrize("setting", ["distribution_scale", "new_rate_factor"])
def test_a_scale_of_nothing_is_refused(make, setting):
    with pytest.raises(ValueError, match=rf"{setting} 0\.0 must be finite and positive"):
        make(**{setting: 0.0})


def test_fewer_than_no_steps_are_refused(make):
    with pytest.raises(
        ValueError, match="fine_first_steps -3 must not be negative; 0 counts all levels from the start"
    ):
        make(fine_first_steps=-3)


@pytest.mark.parametrize(
    ("set_up", "ignored"),
    [
        ({"distribution_scale": 2.0}, "distribution_scale 2.0 is ignored: distribution_weight is 0"),
        ({"start": "random", "detail_scale": 1.0}, "detail_scale 1.0 is ignored: start random"),
    ],
)
def test_a_setting_that_nothing_reads_is_named(make, set_up, ignored):
    with pytest.warns(UserWarning, match=ignored):
        make(**set_up)


@pytest.mark.filterwarnings("ignore")
def test_a_run_in_which_the_fine_level_alone_would_train_is_refused(fit):
    with pytest.raises(ValueError, match=r"fine_first_steps 3 is not below the run's 3 steps, .* shorten it"):
        fit(fine_first_steps=3, steps=3)


@pytest.mark.filterwarnings("ignore")
def test_a_dry_run_is_long_enough_for_all_levels(fit):
    module, *_ = fit(fine_first_steps=1000, steps=3, callbacks=[DevRun(always=True)])
    assert module.fine_first_steps == 2


def test_a_term_over_captions_asks_for_them(make):
    module, batch = make(contrastive_weight=1.0)
    with pytest.raises(ValueError, match="captions the data does not have; set its captions: true"):
        module.training_step({"image": batch["image"], "label": batch["caption_id"]}, 0)


def test_a_step_under_bf16_autocast_has_finite_gradients(make):
    module, batch = make(distribution_weight=1.0, contrastive_weight=1.0, token_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in module.wave.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_teacher_stays_in_evaluation_and_without_gradients(make):
    module, batch = make()
    module.train()
    assert module.wave.training and not module.teacher.training
    module.training_step(batch, 0).backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


class LabelledShards(ShardDataModule):
    """Shards whose labels are the captions' places."""

    @property
    def class_prompts(self):
        return list(TINY_CAPTIONS)


class ValidatedByClass(LabelledShards):
    """The same, whose training says nothing of the classes."""

    train_class_prompts = None


@pytest.fixture
def fit(tmp_path):
    """Runs a few steps; gives the module, its weights before the run, the trainer and the data."""
    architecture = tiny_architecture(tmp_path)
    members = {
        "txt": lambda number: TINY_CAPTIONS[number % len(TINY_CAPTIONS)].encode(),
        "json": lambda number: json.dumps({"label": number % len(TINY_CAPTIONS)}).encode(),
    }
    pattern = write_shards(tmp_path / "shards", 1, 12, **members)

    def run(data=LabelledShards, steps=3, warmup_steps=1, callbacks=(), **options):
        lightning.seed_everything(0, verbose=False)
        module = WaveCLIPDistillation(architecture, learning_rate=1e-2, warmup_steps=warmup_steps, **options)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        loader = data(pattern, pattern, pattern, architecture=architecture, batch_size=6, num_workers=0)
        callbacks = list(callbacks)
        trainer = lightning.Trainer(max_steps=steps, enable_checkpointing=False, callbacks=callbacks, **QUIET)
        trainer.fit(module, loader)
        return module, before, trainer, loader

    return run


def changed(module, before):
    """The top-level parts whose weights a run has moved."""
    after = module.state_dict()
    moved = [key for key in before if not torch.equal(after[key], before[key])]
    return {".".join(key.split(".")[:2]) for key in moved if not key.startswith("validation")}


@pytest.mark.filterwarnings("ignore")
def test_all_trains_the_copy_and_never_the_teacher(fit):
    module, before, trainer, _ = fit(distribution_weight=1.0)
    parts = ("tokenizer", "ln_pre", "transformer", "ln_post", "proj")
    assert changed(module, before) == {f"wave.{part}" for part in parts}
    assert {"val_top1_0", "val_top1_1", "train_distribution"} <= trainer.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore")
def test_new_trains_the_tokenizer_alone(fit):
    module, before, _, _ = fit(train="new")
    assert changed(module, before) == {"wave.tokenizer"}
    for name, _ in module.wave.tokenizer.named_parameters():
        key = f"wave.tokenizer.{name}"
        assert not torch.equal(module.state_dict()[key], before[key]), key


@pytest.mark.filterwarnings("ignore")
def test_without_classes_validation_is_the_cosine_distance_of_each_level(fit):
    module, _, trainer, data = fit(data=ShardDataModule)
    (metrics,) = trainer.validate(module, data, verbose=False)
    (first, second) = data.val_dataloader()
    batch = {"image": torch.cat([first["image"], second["image"]]), "text": first["text"]}
    levels, target, _ = embeddings(module, batch)
    for level, expected in enumerate(cosine_terms(levels, target)):
        assert metrics[f"val_cosine_{level}"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_classes_of_validation_alone_leave_the_loss_as_it_is(fit):
    terms = {"distribution_weight": 1.0, "contrastive_weight": 1.0, "steps": 2}
    named, without = (fit(data=data, **terms)[2].callback_metrics for data in (ValidatedByClass, ShardDataModule))
    for term in ("train_distribution", "train_contrastive"):
        torch.testing.assert_close(named[term], without[term])
    assert "val_top1_0" in named and "val_top1_0" not in without


@pytest.mark.filterwarnings("ignore")
def test_the_accuracy_of_each_level_is_the_share_of_right_answers(fit):
    module, _, trainer, data = fit()
    (metrics,) = trainer.test(module, data, verbose=False)
    classes = module.teacher.encode_text(module.teacher.tokenizer(list(TINY_CAPTIONS)))
    right = [[], []]
    with torch.no_grad():
        for batch in data.test_dataloader():
            for level, z in enumerate(module(batch["image"])):
                right[level].append((z @ classes.T).argmax(1) == batch["label"])
    for level, answers in enumerate(right):
        assert metrics[f"val_top1_{level}"] == pytest.approx(torch.cat(answers).float().mean().item())


@pytest.mark.filterwarnings("ignore")
def test_new_parameters_take_the_higher_rate(fit):
    module, _, trainer, _ = fit(new_rate_factor=4.0, steps=2)
    new = {id(parameter) for parameter in module.wave.tokenizer.parameters()}
    for group in trainer.optimizers[0].param_groups:
        fresh = {id(parameter) in new for parameter in group["params"]}
        assert fresh == {group["initial_lr"] == 4e-2}


@pytest.mark.filterwarnings("ignore")
def test_the_rate_warms_up(fit):
    _, _, trainer, _ = fit(warmup_steps=2)
    (schedule,) = trainer.lr_scheduler_configs
    assert {factor(0) for factor in schedule.scheduler.lr_lambdas} == {1 / 2}


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_plain_and_comes_back(tmp_path, fit):
    module, _, trainer, _ = fit(levels=2, fine_first_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["levels"] == 2
    again = WaveCLIPDistillation.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for actual, expected in zip(again(images), module(images), strict=True):
            assert torch.equal(actual, expected)
