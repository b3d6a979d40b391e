"""Every registered model type and training, from its checkpoint to a directory, to answers and to graphs."""

import json
import re
from importlib.metadata import entry_points

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import directory
from common.cli import main
from common.clip import CLIP
from common.deploy import graphs
from common.deploy.convert import from_checkpoint, trainings
from common.deploy.export import TOLERANCE
from common.deploy.model import load
from common.models import registered
from common.pretraining import CLIPPretraining
from mlip.declip import DeCLIPPretraining
from mlip.filip import FILIP, FILIPPretraining
from mlip.guide import Guide
from mlip.model import MLIP
from mlip.pretraining import MLIPPretraining
from mlip.slip import SLIPPretraining
from patchrank import PatchRankTower, PromptedCLIP, Prompts, PromptTuning, RankPredictor, RankPredictorTraining
from patchrank.aclip import ACLIPPretraining
from patchrank.avit import AViTTower
from patchrank.avit_training import AViTTraining
from patchrank.crossget import CrossGETTower
from patchrank.crossget_training import CrossGETTraining
from patchrank.dynamicvit import DynamicViTTower
from patchrank.dynamicvit_training import DynamicViTTraining
from patchrank.flip import FLIPPretraining
from patchrank.reducer_tuning import ReducerTuning
from tests.common.towers import NAMES, pictures
from waveclip import WaveCLIPDistillation, WaveTower

SIZES = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
"""Of the tiny Guide."""


def predictor(clip):
    return RankPredictor.for_tower(clip.image_tower)


def mlip(clip):
    made = MLIP(clip.architecture, frequency_layers=1, keep_rates={2: 0.5}, guide=Guide(**SIZES))
    made.image_tower.guide_attention["2"].out_proj.reset_parameters()  # zero at first, and then nothing to compare
    return made


def dynamicvit(clip):
    made = DynamicViTTower(clip.image_tower, keep=0.5)
    for weight in made.predictors.parameters():  # untrained modules hardly tell tokens apart
        nn.init.normal_(weight, std=0.2)
    return made


TYPES = {
    "CLIP": lambda clip: (clip, None),
    "wave": lambda clip: (WaveTower.from_image_tower(clip.image_tower), clip),
    "mlip": lambda clip: (mlip(clip), None),
    "filip": lambda clip: (FILIP(MLIP(clip.architecture)), None),
    "patchrank": lambda clip: (PatchRankTower(clip.image_tower, predictor(clip), 0.5, 1), clip),
    "avit": lambda clip: (AViTTower(clip.image_tower, shift=0.0), clip),
    "dynamicvit": lambda clip: (dynamicvit(clip), clip),
    "crossget": lambda clip: (CrossGETTower(clip.image_tower, keep=0.5), clip),
    "prompted": lambda clip: (
        PromptedCLIP(clip, PatchRankTower(clip.image_tower, predictor(clip), 0.5, 1, Prompts("coupled", 2, 2, 64, 64))),
        None,
    ),
}


PATHS = {"wave": 2, "patchrank": 10, "prompted": 10, "dynamicvit": 10, "crossget": 10}
"""How many each type has; the others have one."""
SETTINGS = {"wave": "threshold"} | dict.fromkeys(("patchrank", "prompted", "dynamicvit", "crossget"), "keep")


def made(folder, kind):
    """A model directory of a random tiny model of this type."""
    torch.manual_seed(0)
    model, texts = TYPES[kind](CLIP.tiny().eval())
    directory.write(folder, model.eval(), texts, NAMES, ["{a} {}"])
    return model


def test_every_registered_type_is_here():
    assert set(TYPES) == set(registered()) and set(TRAININGS) == set(trainings())
    assert {point.name for point in entry_points(group="effclip.models")} == set(TYPES)


@torch.no_grad()
@pytest.mark.parametrize("kind", TYPES)
def test_a_directory_of_any_type_answers_as_its_model(tmp_path, kind):
    model, found = made(tmp_path / "model", kind), load(tmp_path / "model", device="cpu")
    images = pictures(5)
    assert found.model.type == kind
    classes = found.classes(NAMES, ["{a} {}"])
    scores, _ = found.paths.runner(found.setting(), classes, found.scale)(images)
    logits = found.scale * model.encode_image(images) @ classes.T
    torch.testing.assert_close(scores, logits.softmax(-1), atol=1e-5, rtol=0)
    assert len(found.costs) == PATHS.get(kind, 1) and min(found.costs) > 0
    assert found.setting_name == SETTINGS.get(kind)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["patchrank", "prompted", "dynamicvit", "crossget"])
def test_a_keep_rate_is_a_budget(tmp_path, kind):
    model, found = made(tmp_path / "model", kind), load(tmp_path / "model", device="cpu")
    images, rates = pictures(3), found.paths.rates
    for rate, cost in zip(rates, found.costs, strict=True):
        assert found.setting(gmacs=cost) == max(r for r, c in zip(rates, found.costs, strict=True) if c <= cost)
        torch.testing.assert_close(
            found.model.images.at(rate).encode_image(images), model.at(rate).encode_image(images)
        )
    z = model.at(0.5).encode_image(images)
    torch.testing.assert_close(z, model.encode_image(images))
    assert not torch.allclose(z, model.at(1.0).encode_image(images), atol=1e-3), "half the tokens are gone"


def test_a_budget_on_the_command_line_says_its_keep_rate(tmp_path, capsys):
    made(tmp_path / "model", "patchrank")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    found = load(tmp_path / "model", device="cpu")
    budget = max(found.costs)
    line = ["classify", str(tmp_path / "red.png"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*line, "--gmacs", f"{budget:.9f}"]) == 0
    assert f"keep rate {found.setting(gmacs=budget):g}" in capsys.readouterr().err


@torch.no_grad()
def test_a_tower_without_a_predictor_has_one_path(tmp_path):
    clip = CLIP.tiny().eval()
    directory.write(tmp_path / "model", PatchRankTower(clip.image_tower, None, 1.0), clip, NAMES)
    found = load(tmp_path / "model", device="cpu")
    assert found.setting_name is None and len(found.costs) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("patchrank", form) for form in ("onnx", "torch-export")),
        *((kind, "onnx") for kind in ("mlip", "prompted", "avit", "dynamicvit", "crossget")),
    ],
)
def test_its_graph_gives_the_same(tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr(graphs, "_seconds", lambda chain, images: 0.5)
    model = made(tmp_path / "model", kind)
    line = ["export", str(tmp_path / "model"), "--format", form]
    assert main([*line, *["--no-text"] * (form == "onnx" and kind != "prompted")]) == 0
    report = json.loads((tmp_path / "model" / form / "export.json").read_text())
    assert report["difference"] <= TOLERANCE and report["type"] == kind
    assert report["setting"] == ({"keep": model.keep} if SETTINGS.get(kind) == "keep" else {})
    file = tmp_path / "model" / form / report["stages"][0]["file"]
    graph = graphs.onnx_graph(file) if form == "onnx" else torch.export.load(file).module()
    for batch in (1, 4):
        images = pictures(batch, seed=batch)
        torch.testing.assert_close(graph(images)[0], model.encode_image(images), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["mlip", "patchrank", "prompted"])
def test_open_clip_has_no_place_for_it(tmp_path, kind, capsys):
    made(tmp_path / "model", kind)
    assert main(["export", str(tmp_path / "model"), "--format", "open-clip"]) == 1
    assert f"is of type {kind}, for which open_clip has no image tower" in capsys.readouterr().err


def start(files):
    """The architecture and weights that a training begins with."""
    return {"architecture": files["architecture"], "weights": files["clip"]}


TRAININGS = {
    "CLIPPretraining": lambda files: CLIPPretraining(files["architecture"]),
    "WaveCLIPDistillation": lambda files: WaveCLIPDistillation(files["architecture"], files["clip"]),
    "MLIPPretraining": lambda files: MLIPPretraining(
        **start(files), frequency_layers=1, keep_rates={2: 0.5}, guide=files["guide"]
    ),
    "FILIPPretraining": lambda files: FILIPPretraining(**start(files), token_dim=8),
    "SLIPPretraining": lambda files: SLIPPretraining(**start(files), hidden_width=8),
    "DeCLIPPretraining": lambda files: DeCLIPPretraining(**start(files), neighbour_queue=8),
    "RankPredictorTraining": lambda files: RankPredictorTraining(**start(files), prune_layer=1, keep=0.5),
    "AViTTraining": lambda files: AViTTraining(**start(files), depth=2.0),
    "DynamicViTTraining": lambda files: DynamicViTTraining(**start(files)),
    "CrossGETTraining": lambda files: CrossGETTraining(**start(files)),
    "ReducerTuning": lambda files: ReducerTuning(**start(files)),
    "FLIPPretraining": lambda files: FLIPPretraining(**start(files)),
    "ACLIPPretraining": lambda files: ACLIPPretraining(**start(files), hidden_width=8, projection_width=4),
    "PromptTuning": lambda files: PromptTuning(
        **start(files), predictor=files["ranks"], keep=0.5, prune_layer=1, prompts=1, depth=2
    ),
}


@pytest.fixture
def files(tmp_path):
    """What a training may begin with: an architecture, weights of a CLIP, a WaveTower, a Guide and a predictor."""
    torch.manual_seed(0)
    clip, paths = CLIP.tiny(), {name: tmp_path / f"{name}.safetensors" for name in ("clip", "wave", "guide", "ranks")}
    WaveTower.from_image_tower(clip.image_tower).save(paths["wave"], clip.architecture)
    clip.save(paths["clip"])
    Guide(**SIZES).save(paths["guide"])
    PatchRankTower(clip.image_tower, predictor(clip), 0.5, 1).save(paths["ranks"], clip.architecture)
    (tmp_path / "tiny.json").write_text(json.dumps(clip.architecture))
    return {name: str(path) for name, path in paths.items()} | {"architecture": str(tmp_path / "tiny.json")}


def checkpoint_of(module, path):
    """What `lightning fit` would save of a training after three steps."""
    checkpoint = {"state_dict": module.state_dict(), "global_step": 3}
    kind = type(module)
    checkpoint["hyper_parameters"] = {**module.hparams, "_class_path": f"{kind.__module__}.{kind.__name__}"}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", TRAININGS)
def test_a_checkpoint_of_any_training_becomes_a_directory(tmp_path, files, name):
    torch.manual_seed(1)
    module = TRAININGS[name](files).eval()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))  # as if it had trained
    model, texts, run = from_checkpoint(checkpoint_of(module, tmp_path / "last.ckpt"))
    assert run["training"] == name and run["steps"] == 3
    own, _ = module.deployable()
    images = pictures(3)
    torch.testing.assert_close(model.encode_image(images), own.encode_image(images), atol=1e-6, rtol=0)
    assert main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "model")]) == 0
    found = load(tmp_path / "model", device="cpu").model
    torch.testing.assert_close(found.images.encode_image(images), own.encode_image(images), atol=1e-5, rtol=0)
    ids = found.texts.tokenizer(NAMES)
    expected = (texts or model).encode_text(ids)
    torch.testing.assert_close(F.normalize(found.texts.encode_text(ids), dim=-1), expected, atol=1e-5, rtol=0)
    assert f"| training | {name} (" in (tmp_path / "model" / "README.md").read_text()


@torch.no_grad()
def test_weights_that_a_training_began_with_may_be_gone(tmp_path, files):
    grown = {"image_size": 64, "levels": 2, "first_levels": files["wave"]}
    module = WaveCLIPDistillation(files["architecture"], files["clip"], **grown).eval()
    for name in ("clip", "wave"):
        (tmp_path / f"{name}.safetensors").unlink()
    model, _, _ = from_checkpoint(checkpoint_of(module, tmp_path / "last.ckpt"))
    images = pictures(2, 64)
    torch.testing.assert_close(model.encode_image(images), module.wave.encode_image(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "part"), [("MLIPPretraining", "guide"), ("PromptTuning", "ranks")])
def test_a_file_that_says_what_a_model_is_made_of_is_asked_for(tmp_path, files, name, part):
    path = checkpoint_of(TRAININGS[name](files), tmp_path / "last.ckpt")
    (tmp_path / f"{part}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name} is built again with .*{re.escape(files[part])}"):
        from_checkpoint(path)


def test_tuned_prompts_are_read_with_the_templates_they_were_tuned_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "model"
    made(folder, "prompted")
    for number, name in enumerate(2 * NAMES):
        file = tmp_path / "labelled" / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 10 + 40 * number).save(file)
    line = ["--model", str(folder), "--data", str(tmp_path / "labelled"), "--workers", "0", "--device", "cpu"]
    for others in ([], ["--template", "{a} {}"], ["--template", "{}"]):
        assert main(["evaluate", *line, *others, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("the model's own templates") == 1
    found = [json.loads(file.read_text())["conditions"] for file in (tmp_path / "out").glob("*.json")]
    hashes = {stated["template"]: stated["templates_hash"] for stated in found}
    assert hashes["own"] == hashes["{a} {}"] != hashes["{}"]
    for others, own in (([], True), (["--template", "{}"], False)):
        assert main(["calibrate", *line, *others, "--gmacs", "1"]) == 0
        assert ("the model's own templates" in capsys.readouterr().out) == own
        deployed = load(folder, device="cpu")
        assert deployed.calibration.conditions["own_templates"] == deployed.prepare().calibrated_on_these == own
    assert main(["evaluate", *line, "--template", "ensemble"]) == 1
    assert "is not in this model's vocabulary" in capsys.readouterr().err, "the data's own prompt"
