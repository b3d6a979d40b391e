"""Each recipe's real model, optimiser and schedule, built at its full size on the meta device.

Weights that a recipe starts from are neither fetched nor read here, but their tag, architecture and
activation are checked as in a real run.
"""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule

from benchmarks import read_recipe
from benchmarks.mlip.paper_scale import MODELS
from common import pretrained as pretrained_module
from common.clip import CLIP
from common.data import catalogue
from mlip import guide as guide_module
from mlip.guide import Guide
from patchrank import prompt_tuning as tuning
from patchrank.predictor import RankPredictor
from tests.readme import ROOT
from tests.test_configs import RECIPES
from waveclip import distillation

SETS = [
    f"{name}@coop"
    for name in ["caltech101", "oxford_pets", "flowers102", "food101", "fgvc_aircraft", "dtd", "ucf101", "imagenet"]
]
"""The data sets of Patch Ranking's table, by the protocol of CoOp."""


def known_record(path, read=pretrained_module.read_record):
    """A file's record; of one that is not there, that of plain GELU."""
    return read(path) if Path(path).is_file() else {"architecture": {}}


def known_state(path, read=pretrained_module.read_state_dict):
    """A file's weights; of one that is not there, none."""
    return read(path) if Path(path).is_file() else {}


@pytest.fixture
def without_weights(monkeypatch):
    """Take any weights as fitting, and a local file, even one still to be trained, as recording plain GELU."""
    monkeypatch.setattr(pretrained_module, "_tag_state_dict", lambda *_: {})
    monkeypatch.setattr(pretrained_module, "read_state_dict", known_state)
    monkeypatch.setattr(pretrained_module, "read_record", known_record)
    monkeypatch.setattr(CLIP, "load_weights", lambda *_: None)
    monkeypatch.setattr(guide_module, "read_record", lambda path: {"guide": {"heads": 12}})
    monkeypatch.setattr(Guide, "load_weights", lambda *_: None)
    monkeypatch.setattr(distillation, "adopt_levels", lambda *_: None)
    monkeypatch.setattr(distillation.WaveTower, "load", lambda path: None)
    monkeypatch.setattr(tuning, "load_predictor", lambda path, tower, prune_layer: RankPredictor.for_tower(tower))


def steps(recipe):
    """Training steps of the whole run; those of epochs by the numbers of pictures and classes in the catalogue."""
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    if "max_steps" in trainer:
        return trainer["max_steps"]
    of = catalogue.entry(*data["name"].split("@"))
    pictures = of.splits["train"].count if data["shots"] is None else data["shots"] * of.num_classes
    return trainer["max_epochs"] * (pictures // data["batch_size"])


def build(recipe):
    """The recipe's model on the meta device, in a trainer that knows only the run's length."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model")
    chosen = parser.parse_object({"model": recipe["model"]})  # typed and checked as on the command line
    package, _, name = chosen.model.class_path.rpartition(".")
    model_class = getattr(import_module(package), name)
    with torch.device("meta"):
        module = model_class(**chosen.model.init_args.as_dict())
    module.trainer = SimpleNamespace(estimated_stepping_batches=steps(recipe))
    return module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_model_optimiser_and_schedule_of_the_real_run(path, without_weights):
    check(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("file", ["predictor.yaml", "prompts.yaml"])
def test_patch_rankings_recipes_hold_for_each_of_its_data_sets(file, name, without_weights):
    recipe = yaml.safe_load((ROOT / "patchrank" / file).read_text())
    recipe["data"]["init_args"]["name"] = name
    check(recipe)


@pytest.mark.parametrize("name", MODELS)
def test_every_line_of_mlips_tables_builds_its_model(name, without_weights):
    training = MODELS[name]
    recipe = read_recipe(training.files[0])
    for overlay in training.files[1:]:
        for part, changed in yaml.safe_load((ROOT / overlay).read_text()).items():
            recipe[part]["init_args"] |= changed["init_args"]
    for part, changed in training.settings.items():
        recipe[part]["init_args"] |= changed
    recipe["trainer"] |= {} if training.steps is None else {"max_steps": training.steps}
    if recipe["model"]["init_args"].get("guide"):
        recipe["model"]["init_args"] |= {"guide": "random", "guide_heads": None}
    check(recipe)


def check(recipe):
    """All parameters that train are in the optimiser, matrices decay, and the schedule has its corners."""
    module = build(recipe)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    trained = {id(p) for p in module.parameters() if p.requires_grad}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert trained and sorted(grouped) == sorted(trained)
    vectors = {id(getattr(part, name)) for part in module.modules() for name in getattr(part, "vectors", ())}
    for group in optimizer.param_groups:
        decays = {p.ndim >= 2 and id(p) not in vectors for p in group["params"]}
        assert decays == {group["weight_decay"] > 0}, "matrices decay; gains, biases and vectors do not"

    total, warmup = steps(recipe), module.hparams.warmup_steps
    peak = float(module.hparams.learning_rate)
    final = module.hparams.get("final_learning_rate", 0.0) / peak
    assert configured["lr_scheduler"]["interval"] == "step" and warmup <= 0.2 * total
    assert warmup > 0 or final > 0, "the released predictor's schedule alone has no warm-up"
    assert peak in [pytest.approx(group["initial_lr"]) for group in optimizer.param_groups]
    for factor in schedule.lr_lambdas:
        assert factor(0) == pytest.approx(1 / max(warmup, 1))
        assert factor(max(warmup - 1, 0)) == factor(warmup) == 1
        assert final < factor(total - 1) < final + 1e-4 and factor(total) == pytest.approx(final)


def test_the_meta_device_builds_what_a_real_one_does(without_weights):
    shapes = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            clip = CLIP.from_open_clip("common/embedded_clip.json")
        shapes.append({key: value.shape for key, value in clip.state_dict().items()})
        assert {p.device.type for p in clip.parameters()} == {device}
    assert shapes[0] == shapes[1]
