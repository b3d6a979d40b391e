"""The `lightning` command: subcommands, recipes, precedence over checkpoints, errors and exit codes."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from common import lightning_cli, recipes
from common.cli import _check_recipe, main
from common.models import load_model
from common.prediction_file import PredictionFile
from common.recipes import resolve_configs
from common.weights import read_record, save_state

MODULE_NAME = "boring_recipe_classes"


class Boring(pl.LightningModule):
    """One linear layer, `width` numbers in; remembers the last instance, for the tests to look at."""

    last = None

    def __init__(self, width: int = 4, tau: float = 0.5, stop_at: int = -1):
        super().__init__()
        if width <= 0:
            raise ValueError(f"width {width} must be positive")
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        Boring.last = self

    def training_step(self, batch, batch_idx):
        if batch_idx == self.hparams.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch).square().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return {"key": [f"{batch_idx}-{row}" for row in range(len(batch))], "embedding": self.layer(batch)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BoringData(pl.LightningDataModule):
    """`count` constant pictures of `width` numbers."""

    def __init__(self, width: int = 4, count: int = 4):
        super().__init__()
        self.pictures = torch.ones(count, width)

    def train_dataloader(self):
        return DataLoader(self.pictures, batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A complete recipe on the boring classes, importable by name; the working directory is empty."""
    module = type(sys)(MODULE_NAME)
    for boring in (Boring, BoringData):
        monkeypatch.setattr(boring, "__module__", MODULE_NAME)
        setattr(module, boring.__name__, boring)
    monkeypatch.setitem(sys.modules, MODULE_NAME, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": f"{MODULE_NAME}.Boring", "init_args": {"tau": 0.9}},
                "data": {"class_path": f"{MODULE_NAME}.BoringData"},
                "trainer": {"max_epochs": 1, **quiet},
            }
        )
    )
    return path


@pytest.fixture
def checkpoint(recipe, tmp_path):
    """A checkpoint of width 6 and tau 0.07, written by a fit through the command."""
    options = ["--model.width", "6", "--model.tau", "0.07", "--data.width", "6"]
    assert main(["fit", "-c", str(recipe), *options]) == 0
    (path,) = (tmp_path / "runs").rglob("*.ckpt")
    return path


def test_fit_then_the_other_subcommands(recipe, checkpoint, tmp_path):
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["width"] == 6
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["model"]["init_args"]["tau"] == 0.07
    for command in ("validate", "test", "predict"):
        assert main([command, "-c", str(recipe), "--data.width", "6", "--ckpt_path", str(checkpoint)]) == 0
    (file,) = (tmp_path / "runs").rglob("predictions.npz")
    with np.load(file, allow_pickle=False) as found:
        assert found["key"].tolist() == ["0-0", "0-1", "1-0", "1-1"]
        torch.testing.assert_close(torch.from_numpy(found["embedding"]), Boring.last.layer(torch.ones(4, 6)))


def test_predictions_of_another_kind_are_left_to_the_caller(tmp_path):
    trainer = SimpleNamespace(predict_loop=SimpleNamespace(predictions=[torch.ones(2)]), log_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="Boring.predict_step gives no dicts with a 'key'"):
        PredictionFile().on_predict_epoch_end(trainer, Boring())
    assert not any(tmp_path.iterdir())


def test_each_process_writes_its_own_predictions(tmp_path):
    loop = SimpleNamespace(predictions=[{"key": ["a", "b"], "scores": torch.ones(2, 3, dtype=torch.bfloat16)}])
    for rank in (0, 1):
        trainer = SimpleNamespace(predict_loop=loop, log_dir=str(tmp_path), global_rank=rank, world_size=2)
        PredictionFile().on_predict_epoch_end(trainer, Boring())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions-0.npz", "predictions-1.npz"]
    assert np.load(tmp_path / "predictions-1.npz")["scores"].shape == (2, 3)


@pytest.mark.parametrize(("typed", "tau"), [([], 0.9), (["--model.tau", "0.33"], 0.33)])
def test_what_the_user_says_wins_over_the_checkpoint(recipe, checkpoint, typed, tau):
    options = ["--data.width", "6", "--ckpt_path", str(checkpoint), *typed]
    assert main(["validate", "-c", str(recipe), *options]) == 0
    assert Boring.last.hparams.tau == tau  # the recipe's or the command line's, not the checkpoint's 0.07
    assert Boring.last.hparams.width == 6  # said nowhere else, and the weights need it


def test_a_checkpoint_of_another_class_gives_weights_alone(recipe, tmp_path):
    module = Boring(width=4)
    path = tmp_path / "other.ckpt"
    hparams = {"_class_path": "elsewhere.Other", "depth": 3}
    torch.save(
        {
            "state_dict": module.state_dict(),
            "hyper_parameters": hparams,
            "pytorch-lightning_version": pl.__version__,
        },
        path,
    )
    with pytest.warns(UserWarning, match=r"elsewhere\.Other"):
        assert main(["validate", "-c", str(recipe), "--ckpt_path", str(path)]) == 0


def test_a_checkpoint_whose_class_has_moved_to_another_module_still_gives_its_settings(recipe, checkpoint):
    stored = torch.load(checkpoint, weights_only=True)
    stored["hyper_parameters"]["_class_path"] = "former.module.Boring"
    torch.save(stored, checkpoint)
    assert main(["validate", "-c", str(recipe), "--data.width", "6", "--ckpt_path", str(checkpoint)]) == 0
    assert Boring.last.hparams.width == 6


class Payload:
    """Unpickling one of these would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


@pytest.mark.parametrize(("precision", "said"), [("bf16-mixed", 1), ("32-true", 0)])
def test_emulated_bfloat16_is_said_to_be_slow(recipe, monkeypatch, recwarn, precision, said):
    monkeypatch.setattr(lightning_cli, "BF16_PRODUCTS", False)
    assert main(["fit", "-c", str(recipe), "--trainer.precision", precision, "--trainer.max_steps", "1"]) == 0
    slow = r"^bfloat16 is emulated here, .*; --trainer\.precision 32-true avoids that$"
    assert sum(bool(re.search(slow, str(warning.message))) for warning in recwarn) == said


def test_refused_checkpoints(recipe, tmp_path, capsys):
    torch.save({"hyper_parameters": {"bad": Payload()}}, tmp_path / "bad.ckpt")
    refused = {
        "https://example.org/x.ckpt": "web address",
        "nowhere.ckpt": str(tmp_path / "nowhere.ckpt"),
        "bad.ckpt": "could run code",
    }
    for path, reason in refused.items():
        assert main(["validate", "-c", str(recipe), "--ckpt_path", path]) == 1
        error = capsys.readouterr().err
        assert error.startswith("lightning: error: ")
        assert error.count("\n") == 1
        assert reason in error
    assert not (tmp_path / "owned").exists()


def test_later_files_and_options_win(recipe, tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {width: 8}}\ntrainer: {max_steps: 3}\n")
    options = ["-c", str(recipe), f"--config={overlay}", "--model.init_args.width", "9", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options])
    assert stop.value.code in (0, None)
    merged = yaml.safe_load(capsys.readouterr().out)
    assert merged["model"]["init_args"] == {"width": 9, "tau": 0.9, "stop_at": -1}
    assert merged["trainer"]["max_steps"] == 3
    assert merged["trainer"]["default_root_dir"] is None  # below EFFCLIP_RUNS, by recipe and name
    assert merged["seed_everything"] == 0


def test_a_misspelt_setting_is_named(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(recipe), "--model.init_args.tua", "1"])
    assert stop.value.code == 2
    assert "tua" in capsys.readouterr().err


def test_a_misspelt_setting_of_the_model_is_one_line_with_a_guess(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "waveclip/shapes.yaml", "--model.lerning_rate", "1"])
    assert stop.value.code == 2
    sentence = "lightning: error: WaveCLIPDistillation has no setting 'lerning_rate'; did you mean learning_rate?"
    assert capsys.readouterr().err.splitlines()[-1] == sentence


def test_a_setting_of_a_base_that_the_class_does_not_take_is_no_guess(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", "waveclip/shapes.yaml", "--data.shuffle_bufer", "5"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "EmbeddedDataModule has no setting 'shuffle_bufer'" in said and "shuffle_buffer" not in said


@pytest.mark.parametrize("asked", [["--print_config"], ["--data.help", "common.data.shards.ShardDataModule"]])
def test_help_needs_no_recipe(asked):
    _check_recipe(["fit", *asked])


def test_weights_that_a_packaged_recipe_names_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = "benchmarks/weights/shapes_clip.safetensors"  # waveclip/shapes.yaml starts from it
    assert read_record(named)["architecture"]["embed_dim"] > 0
    assert load_model(named).files.keys() == {Path(named).name}
    file = tmp_path / named
    file.parent.mkdir(parents=True)
    save_state({"x": torch.ones(1)}, file, {"own": {}}, torch.float32)
    assert read_record(named) == {"own": {}}  # a file of the working directory comes first
    with pytest.raises(ValueError, match=re.escape(f"no weights at {tmp_path}/benchmarks/weights/absent.safetensors")):
        read_record("benchmarks/weights/absent.safetensors")


def test_packaged_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    package = tmp_path / "installed" / "waveclip"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sub" / "a.yaml").touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "waveclip", raising=False)
    monkeypatch.chdir(tmp_path)
    packaged = str(package / "sub" / "a.yaml")
    assert resolve_configs(["fit", "-c", "waveclip/sub/a.yaml", "-c=waveclip/sub/a.yaml", "-c"]) == [
        "fit", "-c", packaged, f"-c={packaged}", "-c",
    ]  # fmt: skip
    Path("waveclip/sub").mkdir(parents=True)
    Path("waveclip/sub/a.yaml").touch()  # a file of the working directory comes first
    assert resolve_configs(["-c", "waveclip/sub/a.yaml"]) == ["-c", "waveclip/sub/a.yaml"]


@pytest.mark.parametrize("name", ["missing.yaml", "waveclip/missing.yaml", "https://example.org/a.yaml", ""])
def test_a_missing_recipe_is_named_by_its_absolute_path(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", name]) == 1
    error = capsys.readouterr().err
    assert str((tmp_path / name).absolute()) in error
    assert "Traceback" not in error


def test_errors_of_others_and_debugging_show_the_traceback(recipe, monkeypatch):
    arguments = ["fit", "-c", str(recipe), "--model.width", "0"]
    with pytest.raises(ValueError, match="width 0 must be positive"):
        main(arguments)  # a user's own class
    monkeypatch.setattr(recipes, "_raised_here", lambda error: True)
    assert main(arguments) == 1
    monkeypatch.setenv("EFFCLIP_DEBUG", "1")
    with pytest.raises(ValueError, match="width 0 must be positive"):
        main(arguments)


def test_sigterm_is_reported_as_such(recipe):
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["fit", "-c", str(recipe), "--model.stop_at", "0"]) == 143
    assert signal.getsignal(signal.SIGTERM) == handler


def test_what_is_not_ours_goes_to_the_other_owner_of_the_name(monkeypatch, capsys):
    ours = importlib.metadata.EntryPoint("lightning", "common.cli:main", "console_scripts")
    other = importlib.metadata.EntryPoint("lightning", "builtins:dict", "console_scripts")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: [ours, other])
    assert main(["login"]) == {}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: [ours])
    for arguments, reason in {("login",): "'login'", (): "missing", ("-c", "a.yaml", "fit"): "first"}.items():
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "usage: lightning" in error if not arguments else error.count("\n") == 1
        assert reason in error
    monkeypatch.setattr(sys, "argv", ["/usr/bin/effclip"])
    assert main(["clasify"]) == 2
    assert capsys.readouterr().err == "effclip: error: no subcommand 'clasify'; did you mean classify?\n"
    assert main(["--help"]) == 0


def test_the_installed_commands_answer_without_importing_torch():
    scripts = Path(sys.executable).parent
    for command in ([scripts / "effclip"], [sys.executable, "-X", "importtime", "-m", "common.cli"]):
        answer = subprocess.run([*command, "fit", "-c", "missing.yaml"], capture_output=True, text=True, timeout=60)
        assert answer.returncode == 1
        assert "missing.yaml" in answer.stderr
        assert " torch" not in answer.stderr
    owners = importlib.metadata.entry_points(group="console_scripts", name="lightning")
    assert "common.cli:main" in {script.value for script in owners}
