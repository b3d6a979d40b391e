"""Runs as command lines, what is resumed and skipped, and checkpoints turned into weights."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from benchmarks.training import export, retrain
from benchmarks.training.retrain import RUNS, Run, chosen, last_checkpoint
from common.cli import main as lightning
from common.clip import CLIP
from common.pretraining import CLIPPretraining
from common.testing import tiny_architecture
from mlip import Guide
from mlip.guide_mae import GuideMAE
from tests.readme import ROOT
from waveclip import WaveCLIPDistillation, WaveTower

CHANGED = [run for run in RUNS if len(run.arguments()) > 2]  # a recipe as it stands: tests/test_configs.py


@pytest.mark.parametrize("run", CHANGED, ids=lambda run: run.name)
def test_every_run_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_the_runs_of_a_package_keep_to_its_budget():
    for package in {Path(run.recipe).parent for run in RUNS}:
        assert sum(run.minutes for run in RUNS if Path(run.recipe).parent == package) <= 150
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_shorter_runs_have_a_shorter_schedule():
    run = Run("x", "waveclip/embedded.yaml", 15, seed=2)
    arguments = run.arguments("more.yaml")
    assert arguments[:4] == ["-c", "waveclip/embedded.yaml", "-c", "more.yaml"]
    steps = int(arguments[arguments.index("--trainer.max_steps") + 1])
    recipe = yaml.safe_load((ROOT / run.recipe).read_text())
    whole = recipe["trainer"]["max_steps"]
    for name in ("warmup_steps", "fine_first_steps"):
        part = int(arguments[arguments.index(f"--model.init_args.{name}") + 1])
        assert part / recipe["model"]["init_args"][name] == pytest.approx(steps / whole, rel=0.1)
    assert arguments[-4:] == ["--seed_everything", "2", "--data.init_args.seed", "2"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_last_step_is_saved(run):
    """Lightning writes last.ckpt at its interval, and at the end only if it never did before."""
    trainer = yaml.safe_load((ROOT / run.recipe).read_text())["trainer"]
    every = trainer["callbacks"][-1]["init_args"]["every_n_train_steps"]
    assert run.steps % every == 0 or run.steps < every


def test_unknown_run_is_named():
    with pytest.raises(ValueError, match="ONLY=teecher is no run; there are teacher"):
        chosen("teecher")


def test_listing_trains_nothing_and_marks_what_is_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.delenv("ONLY", raising=False)
    monkeypatch.delenv("CONFIG", raising=False)
    (tmp_path / "retrain/teacher").mkdir(parents=True)
    (tmp_path / "retrain/teacher/result.json").write_text("{}")
    monkeypatch.setattr(retrain, "train", lambda *arguments: pytest.fail("it trained"))
    assert retrain.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "teacher                 finished" in printed
    assert f"about {RUNS[1].minutes} min" in printed
    monkeypatch.setenv("ONLY", "teacher")  # finished: skipped without --list too
    monkeypatch.delenv("SMOKE", raising=False)
    assert retrain.main([]) == 0


def test_the_newest_checkpoint_is_the_one_to_go_on_from(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for version in range(2):
        folder = tmp_path / f"version_{version}"
        folder.mkdir()
        (folder / "last.ckpt").touch()
        os.utime(folder / "last.ckpt", (version, version))
    assert last_checkpoint(tmp_path).parent.name == "version_1"


def test_a_finished_training_is_not_run_again_and_an_interrupted_one_goes_on(monkeypatch, tmp_path):
    run, lines = RUNS[0], []

    def timed(line, record):
        lines.append(line)
        torch.save({"global_step": run.steps if len(lines) > 1 else 500}, tmp_path / "last.ckpt")
        record.write_text(json.dumps([2.0] * len(lines)))
        return int(len(lines) == 1)  # the first is killed

    monkeypatch.setattr(retrain, "_timed", timed)
    with pytest.raises(ValueError, match="run teacher ended with code 1; the same command continues it"):
        retrain.fit(run, tmp_path)
    made = [retrain.fit(run, tmp_path, places={"data": {"root": "/data"}}) for _ in range(2)]
    assert made[0] == made[1] and (made[0]["steps"], made[0]["minutes"], made[0]["legs"]) == (run.steps, 4.0, 2)
    assert "/data" not in made[0]["command"]
    assert len(lines) == 2 and "--ckpt_path" not in lines[0]
    assert lines[1][-2:] == ["--ckpt_path", str(tmp_path / "last.ckpt")] and "/data" in lines[1]


def test_a_training_whose_time_was_lost_says_how_to_mend_it(tmp_path):
    torch.save({"global_step": RUNS[0].steps}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"run teacher is trained, .* write its minutes into .*minutes\.json"):
        retrain.fit(RUNS[0], tmp_path)


STATED = {
    "clean": True,
    "seed": 0,
    "revision": "abc",
    "date": "2026",
    "device": "CPU",
    "threads": 2,
    "torch": "2",
}
RESULT = {
    "name": "teacher",
    "command": "lightning fit",
    "conditions": STATED,
    "minutes": 29.6,
    "steps": 3000,
    "names": 1291,
}


def saved(module, path):
    """A checkpoint as `lightning fit` writes it."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def test_checkpoint_becomes_weights(tmp_path):
    architecture = tiny_architecture(tmp_path)
    teacher = CLIPPretraining(architecture)
    saved(teacher, tmp_path / "teacher.ckpt")
    export.save(
        export.from_checkpoint(tmp_path / "teacher.ckpt", "common/embedded_clip.yaml"),
        tmp_path / "t.safetensors",
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = teacher.clip.eval().encode_image(images)
        torch.testing.assert_close(
            CLIP.load(tmp_path / "t.safetensors").eval().encode_image(images), expected, atol=5e-3, rtol=0
        )
        student = WaveCLIPDistillation(architecture, weights=str(tmp_path / "t.safetensors"))
        saved(student, tmp_path / "student.ckpt")
        module = export.from_checkpoint(tmp_path / "student.ckpt", "waveclip/embedded.yaml")
        export.save(module, tmp_path / "w.safetensors")
        loaded = WaveTower.load(tmp_path / "w.safetensors").eval()
        torch.testing.assert_close(
            loaded.encode_image(images), student.wave.eval().encode_image(images), atol=5e-3, rtol=0
        )


def test_a_guides_checkpoint_becomes_its_encoder_and_its_card_states_the_loss(tmp_path, monkeypatch):
    module = GuideMAE()
    saved(module, tmp_path / "guide.ckpt")
    path = tmp_path / "guide.safetensors"
    loaded = export.from_checkpoint(tmp_path / "guide.ckpt", "mlip/guide_mae.yaml")
    export.save(loaded, path)
    images = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(Guide.from_weights(str(path))(images), module.guide(images), atol=2e-2, rtol=0)
    monkeypatch.setattr(retrain, "batches", lambda split, pictures: [{"image": images[:2]}, {"image": images[2:]}])
    found = retrain.reconstruction(loaded)
    first, second = (
        module.loss(part, torch.Generator().manual_seed(place)) for place, part in enumerate((images[:2], images[2:]))
    )
    assert found["test"]["masked patches"]["loss"] == pytest.approx(float(2 * first + second) / 3, rel=1e-5)
    assert "mean squared error" in export.card(path, RESULT | found)


def test_card_says_where_the_weights_come_from(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"0" * 1000)
    found = {"top1": {"accuracy": 0.61, "interval": [0.6, 0.62], "pictures": 20656}}
    text = export.card(path, json.loads(json.dumps(RESULT | {"val": found, "test": found})))
    for words in (
        "lightning fit",
        "abc (clean tree)",
        "61.00 % [60.00, 62.00] of 20,656",
        "CC-BY 4.0",
        "CLDR",
    ):
        assert words in text


def test_table_says_what_was_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(retrain, "STORED", tmp_path)
    for seed, fine in enumerate((0.55, 0.57)):
        level = {"accuracy": fine, "interval": [fine - 0.01, fine + 0.01]}
        made = {"minutes": 15.2, "test": {"coarse": level, "fine": level}}
        (tmp_path / f"waveclip-seed{seed}.json").write_text(json.dumps(made))
    text = retrain.table()
    assert text.count("not run |") == 2 * (len(RUNS) - 2)
    assert "| waveclip-seed0 | 15 | 55.0 [54.0, 56.0] | 55.0 [54.0, 56.0] |" in text
    assert "fine 55.0 to 57.0" in text
