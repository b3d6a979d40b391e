"""A run as a command line: its schedule, and how it continues after an interruption."""

import json
import os

import pytest
import torch
import yaml

from benchmarks import read_recipe
from benchmarks.training import drift, run
from benchmarks.training.retrain import RUNS
from benchmarks.training.run import Run, last_checkpoint
from tests.readme import ROOT


def test_shorter_runs_have_a_shorter_schedule():
    short = Run("x", "waveclip/photos.yaml", 5, seed=2)
    arguments = short.arguments("more.yaml")
    assert arguments[:4] == ["-c", "waveclip/photos.yaml", "-c", "more.yaml"]
    steps = int(arguments[arguments.index("--trainer.max_steps") + 1])
    recipe = yaml.safe_load((ROOT / short.recipe).read_text())
    whole = recipe["trainer"]["max_steps"]
    for name in ("warmup_steps", "fine_first_steps"):
        part = int(arguments[arguments.index(f"--model.init_args.{name}") + 1])
        assert part / recipe["model"]["init_args"][name] == pytest.approx(steps / whole, rel=0.1)
    assert arguments[-4:] == ["--seed_everything", "2", "--data.init_args.seed", "2"]


def test_a_longer_run_has_a_longer_schedule():
    arguments = Run("x", "waveclip/shapes.yaml", 50, length=20_000).arguments()
    recipe = yaml.safe_load((ROOT / "waveclip/shapes.yaml").read_text())
    factor = 20_000 / recipe["trainer"]["max_steps"]
    assert factor > 1 and arguments[arguments.index("--trainer.max_steps") + 1] == "20000"
    warmup = recipe["model"]["init_args"]["warmup_steps"]
    assert int(arguments[arguments.index("--model.init_args.warmup_steps") + 1]) == round(factor * warmup)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_last_step_is_saved(run):
    """Lightning writes last.ckpt at its interval, and at the end only if it never did before."""
    trainer = yaml.safe_load((ROOT / run.recipe).read_text())["trainer"]
    every = trainer["callbacks"][-1]["init_args"]["every_n_train_steps"]
    assert run.steps % every == 0 or run.steps < every


def test_the_newest_checkpoint_is_the_one_to_go_on_from(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for version in range(2):
        folder = tmp_path / f"version_{version}"
        folder.mkdir()
        (folder / "last.ckpt").touch()
        os.utime(folder / "last.ckpt", (version, version))
    assert last_checkpoint(tmp_path).parent.name == "version_1"


def test_a_finished_training_is_not_run_again_and_an_interrupted_one_goes_on(monkeypatch, tmp_path):
    teacher, lines = RUNS[0], []

    def timed(line, record, apart):
        lines.append(line)
        torch.save({"global_step": teacher.steps if len(lines) > 1 else 500}, tmp_path / "last.ckpt")
        record.write_text(json.dumps([2.0] * len(lines)))
        return int(len(lines) == 1)  # the first is killed

    monkeypatch.setattr(run, "_timed", timed)
    with pytest.raises(ValueError, match="run teacher ended with code 1; the same command continues it"):
        run.fit(teacher, tmp_path)
    made = [run.fit(teacher, tmp_path, places={"data": {"root": "/data"}}) for _ in range(2)]
    assert made[0] == made[1] and (made[0]["steps"], made[0]["minutes"], made[0]["legs"]) == (teacher.steps, 4.0, 2)
    assert "/data" not in made[0]["command"]
    assert len(lines) == 2 and "--ckpt_path" not in lines[0]
    assert lines[1][-2:] == ["--ckpt_path", str(tmp_path / "last.ckpt")] and "/data" in lines[1]


def test_a_processor_that_emulates_bfloat16_trains_in_float32_and_says_so(monkeypatch, tmp_path):
    lines = []

    def timed(line, record, apart):
        lines.append(line)
        torch.save({"global_step": RUNS[0].steps}, tmp_path / "last.ckpt")
        record.write_text("[1.0]")
        return 0

    monkeypatch.setattr(drift, "BF16_PRODUCTS", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "_timed", timed)
    made = run.fit(RUNS[0], tmp_path)
    assert read_recipe(RUNS[0].recipe)["trainer"]["precision"] == "bf16-mixed"
    assert lines[0][lines[0].index("--trainer.precision") + 1] == made["conditions"]["precision"] == "32-true"


def test_a_few_steps_may_run_in_this_process(monkeypatch, tmp_path):
    lines = []

    def lightning(line):
        lines.append(line)
        torch.save({"global_step": 4}, tmp_path / "last.ckpt")
        return 0

    monkeypatch.setattr(run, "lightning", lightning)
    made = run.fit(RUNS[0], tmp_path, "common/smoke.yaml", apart=False)
    assert made["steps"] == 4 and lines[0][:5] == ["fit", "-c", RUNS[0].recipe, "-c", "common/smoke.yaml"]


def test_an_overlay_may_set_another_precision(monkeypatch, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {precision: 16-mixed}\n")
    monkeypatch.setattr(run, "lightning", lambda line: torch.save({"global_step": 4}, tmp_path / "last.ckpt") or 0)
    made = run.fit(RUNS[0], tmp_path, str(tmp_path / "more.yaml"), apart=False)
    assert made["conditions"]["precision"] == "16-mixed"


def test_a_training_whose_time_was_lost_says_how_to_mend_it(tmp_path):
    torch.save({"global_step": RUNS[0].steps}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"run teacher is trained, .* write its minutes into .*minutes\.json"):
        run.fit(RUNS[0], tmp_path)
