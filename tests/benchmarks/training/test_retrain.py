"""The embedded models' runs: commands, budget, what is listed and skipped, and their table."""

import json
from pathlib import Path

import pytest

from benchmarks.training import retrain, shapes
from benchmarks.training.retrain import RUNS, chosen
from common.cli import main as lightning

ALONE = [run for run in RUNS if run not in shapes.RUNS]
CHANGED = [run for run in ALONE if len(run.arguments()) > 2]  # a recipe as it stands: tests/test_configs.py
CHANGED += [runs[1] for _, runs in shapes.FAMILIES]


@pytest.mark.parametrize("run", CHANGED, ids=lambda run: run.name)
def test_every_run_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_the_runs_of_a_package_keep_to_its_budget():
    for package in {Path(run.recipe).parent for run in ALONE}:
        assert sum(run.minutes for run in ALONE if Path(run.recipe).parent == package) <= 150
    assert max(run.minutes for run in shapes.RUNS) <= 60
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_unknown_run_is_named():
    with pytest.raises(ValueError, match="ONLY=teecher is no run; there are teacher"):
        chosen("teecher")


def test_listing_trains_nothing_and_marks_what_is_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.delenv("ONLY", raising=False)
    monkeypatch.delenv("CONFIG", raising=False)
    (tmp_path / "retrain/teacher").mkdir(parents=True)
    (tmp_path / "retrain/teacher/result.json").write_text("{}")
    monkeypatch.setattr("benchmarks.training.run.train", lambda *arguments: pytest.fail("it trained"))
    assert retrain.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "teacher                 finished" in printed
    assert f"about {RUNS[1].minutes} min" in printed
    monkeypatch.setenv("ONLY", "teacher")  # finished: skipped without --list too
    monkeypatch.delenv("SMOKE", raising=False)
    assert retrain.main([]) == 0


def test_table_says_what_was_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(retrain, "STORED", tmp_path)
    for seed, fine in enumerate((0.55, 0.57)):
        level = {"accuracy": fine, "interval": [fine - 0.01, fine + 0.01]}
        made = {"minutes": 15.2, "test": {"coarse": level, "fine": level}}
        (tmp_path / f"waveclip-seed{seed}.json").write_text(json.dumps(made))
    text = retrain.table()
    assert text.count("not run |") == 2 * (len(ALONE) - 2 + len(shapes.FAMILIES))
    assert "| waveclip-seed0 | 15 | 55.0 [54.0, 56.0] | 55.0 [54.0, 56.0] |" in text
    assert "fine 55.0 to 57.0" in text


def test_the_seeds_of_a_family_share_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(retrain, "STORED", tmp_path)
    for seed, accuracy in enumerate((0.70, 0.72)):
        made = {"minutes": 50 + 10 * seed, "test": {"top1": {"accuracy": accuracy}}}
        (tmp_path / f"shapes-teacher-{seed}.json").write_text(json.dumps(made))
    line = next(line for line in retrain.table().splitlines() if "shapes-teacher, " in line)
    assert line == "| shapes-teacher, 2 of 3 seeds | 55 | – | 71.0 ± 1.4 | `make retrain ONLY='shapes-teacher-*'` |"


def test_a_pattern_chooses_runs():
    assert [run.name for run in chosen("shapes-half-*")] == ["shapes-half-0", "shapes-half-1", "shapes-half-2"]
