"""MLIP's recipes through the `lightning` command: a smoke run, missing data, a stop signal, and what they state."""

import sys

import pytest
import torch
import yaml

from common.cli import main
from common.clip import load_architecture
from mlip.tower import PAPER_LAYERS
from tests.readme import ROOT

PAIRS = {"yfcc15m": (15_388_848, 32), "cc3m": (2_900_000, 25), "cc12m": (11_000_000, 25)}  # training pairs, epochs
SHARDS = {"yfcc15m": "YFCC15M", "cc3m": "CC3M_SHARDS", "cc12m": "CC12M_SHARDS"}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without data, weights or runs."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    for name in ("MLIP_GUIDE", *SHARDS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("name", PAIRS)
def test_a_recipe_states_the_papers_setting(name):
    recipe = yaml.safe_load((ROOT / f"mlip/{name}.yaml").read_text())
    model, data, trainer = recipe["model"]["init_args"], recipe["data"]["init_args"], recipe["trainer"]
    pairs, epochs = PAIRS[name]
    assert data["train_num_samples"] == pairs and data["global_batch_size"] == 4096
    assert trainer["max_steps"] == pairs * epochs // 4096
    assert model["warmup_steps"] == 2000 and model["weight_decay"] == 0.1
    layers = PAPER_LAYERS[model["architecture"]]
    assert all(model[key] == layers[key] for key in ("frequency_layers", "keep_rates"))


def merged(*overlays):
    """The settings of YFCC15M's recipe under overlays."""
    settings = {}
    for file in ("yfcc15m", *overlays):
        recipe = yaml.safe_load((ROOT / f"mlip/{file}.yaml").read_text())
        for section in ("model", "data"):
            settings.setdefault(section, {}).update(recipe.get(section, {}).get("init_args", {}))
    return settings


@pytest.mark.parametrize(("overlay", "name"), [("vit_b_32", "ViT-B-32"), ("vit_l_14", "ViT-L-14")])
def test_overlays_for_other_sizes_state_tables_12_and_13(overlay, name):
    settings, layers = merged(overlay), PAPER_LAYERS[name]
    model = settings["model"]
    assert model["architecture"] == settings["data"]["architecture"]
    assert {key: model[key] for key in ("frequency_layers", "keep_rates")} | {"embed_dim": 512} == layers
    ours, open_clips = load_architecture(model["architecture"]), load_architecture(name)
    assert ours["embed_dim"] == 512
    assert open_clips["vision_cfg"] == ours["vision_cfg"] and open_clips["text_cfg"] == ours["text_cfg"]


def test_the_plain_overlay_is_clip_alone_and_late_interaction_adds_filips_loss():
    parts = ("frequency_layers", "keep_rates", "guide", "frequency_weight", "frequency_token_weight")
    for overlay in ("clip", "late_interaction"):
        model = merged("vit_b_32", overlay)["model"]
        assert not any(model[part] for part in parts) and model["architecture"] == "ViT-B-32"
    assert merged("clip")["model"]["spatial_token_weight"] == 0 and merged("clip")["model"]["spatial_weight"] == 1
    assert model["spatial_token_weight"] == 0.5 and model["spatial_matching"] == "filip"


@pytest.mark.parametrize("name", PAIRS)
def test_missing_data_is_said_in_one_message_with_the_way_to_it(name, bare, capsys):
    assert main(["fit", "-c", f"mlip/{name}.yaml"]) == 1
    error = capsys.readouterr().err
    assert error.count("lightning: error:") == 1 and "Traceback" not in error
    for word in (
        f"{PAIRS[name][0]:,} training samples",
        f"set the environment variable {SHARDS[name]}",
        "docs/data.md",
    ):
        assert word in error
    assert ("variant 'declip'" in error) == (name == "yfcc15m")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAIRS)
def test_the_smoke_overlay_runs_any_of_them(name, bare, capsys):
    assert main(["fit", "-c", f"mlip/{name}.yaml", "-c", "mlip/smoke.yaml"]) == 0
    (checkpoint,) = (bare / "runs").rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    stated = yaml.safe_load((ROOT / f"mlip/{name}.yaml").read_text())["model"]["init_args"]
    tower = saved["hyper_parameters"]
    assert tower["frequency_layers"] == stated["frequency_layers"]
    assert {int(layer): rate for layer, rate in tower["keep_rates"].items()} == stated["keep_rates"]
    assert saved["global_step"] == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overlay", ["clip", "vit_l_14"])
def test_the_smoke_overlay_runs_it_under_another(overlay, bare):
    assert main(["fit", "-c", "mlip/yfcc15m.yaml", "-c", f"mlip/{overlay}.yaml", "-c", "mlip/smoke.yaml"]) == 0
    (checkpoint,) = (bare / "runs").rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["hyper_parameters"]["frequency_layers"] == {"clip": 0, "vit_l_14": 8}[overlay]
    assert any("guide." in key for key in saved["state_dict"]) == (overlay == "vit_l_14")


@pytest.mark.filterwarnings("ignore")
def test_sigterm_leaves_a_checkpoint_and_an_exit_code(bare, monkeypatch):
    (bare / "stopped.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Stopped(Callback):\n"
        "    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):\n"
        "        if trainer.global_step == 2:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.chdir(bare)
    line = ["fit", "-c", "mlip/yfcc15m.yaml", "-c", "mlip/smoke.yaml", "--trainer.limit_val_batches", "0"]
    assert main([*line, "--trainer.max_steps", "1000000", "--trainer.callbacks+=stopped.Stopped"]) == 143
    (checkpoint,) = (bare / "runs").rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2 and "optimizer_states" in saved
