"""The embedded models' runs: commands, budget, what is listed and skipped, and their table."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.statistics import mean_interval
from benchmarks.training import retrain, shapes
from benchmarks.training.retrain import RUNS, chosen
from benchmarks.training.run import Run, is_finished
from benchmarks.waveclip import answers
from benchmarks.waveclip.answers import Answers
from common.cli import main as lightning

CHANGED = [
    runs[1] for _, runs in (*shapes.FAMILIES, *shapes.FEWER_PATCHES)
]  # a recipe as it stands: tests/test_configs.py


@pytest.mark.parametrize("run", CHANGED, ids=lambda run: run.name)
def test_every_run_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_every_run_keeps_to_an_hour():
    assert max(run.minutes for run in RUNS) <= 60
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
    monkeypatch.setattr("benchmarks.training.run.STORED", tmp_path / "committed")
    monkeypatch.setattr(retrain, "train", lambda *arguments: pytest.fail("it trained"))
    assert retrain.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "teacher                 finished" in printed
    assert f"about {RUNS[1].minutes} min" in printed
    monkeypatch.setenv("ONLY", "teacher")  # finished: skipped without --list too
    monkeypatch.delenv("SMOKE", raising=False)
    assert retrain.main([]) == 0


def test_a_committed_run_is_finished_in_a_fresh_clone_unless_it_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))  # a fresh clone has no run folders
    monkeypatch.delenv("CONFIG", raising=False)
    states = {}
    for only in ("shapes-[tw]*", "shapes-teacher-0", "shapes-cosine10-2"):
        monkeypatch.setenv("ONLY", only)
        retrain.main(["--list"])
        *lines, last = capsys.readouterr().out.splitlines()
        states |= {(only, line.split()[0]): line.split()[1] for line in lines}
    assert last.startswith("1 not finished: planned for 0.1 hours on 2 cores")
    assert states["shapes-[tw]*", "shapes-teacher-0"] == "finished"
    assert states["shapes-[tw]*", "shapes-teacher96-0"] == "about", "it has no result"
    assert states["shapes-teacher-0", "shapes-teacher-0"] == states["shapes-cosine10-2", "shapes-cosine10-2"] == "about"


def test_a_committed_result_without_its_weights_is_trained_again(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("benchmarks.training.run.STORED", tmp_path)
    (tmp_path / "student.json").write_text("{}")
    for there in (False, True):
        run = Run("student", "waveclip/shapes.yaml", 45, output=tmp_path / "student.safetensors")
        assert is_finished(run, committed=True) is there
        run.output.touch()
    assert not is_finished(run) and not is_finished(run, "overlay.yaml", committed=True)


def test_a_student_without_its_teacher_names_the_command_that_makes_it(monkeypatch):
    teacher = next(run for run in RUNS if run.name == "shapes-teacher96-0")
    absent = replace(teacher, output=teacher.output.with_stem("absent"))
    monkeypatch.setattr(retrain, "RUNS", [absent if run is teacher else run for run in RUNS])
    student = {"model": {"weights": "benchmarks/weights/absent.safetensors"}}
    with pytest.raises(ValueError, match=r"starts from .*absent.* `make retrain ONLY=shapes-teacher96-0` makes it"):
        retrain.check_start(Run("student", "waveclip/shapes_96.yaml", 1, settings=student))


def test_table_says_what_was_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(retrain, "STORED", tmp_path)
    made = {"minutes": 24.2, "test": {"top1": {"accuracy": 0.55, "interval": [0.54, 0.56]}}}
    (tmp_path / "teacher.json").write_text(json.dumps(made))
    text = retrain.table()
    assert text.count("not run |") == 2 * len(CHANGED)
    assert "| teacher | 24 | – | 55.0 [54.0, 56.0] |" in text


def _finish(folder, name, minutes, correct):
    """The record of a run, and its answers on test: correct, bool [L,M]."""
    (folder / f"{name}.json").write_text(json.dumps({"minutes": minutes}))
    kept = np.zeros((1, correct.shape[1]), np.float32)
    answers.write(folder / f"{name}.npz", {"test": Answers(correct, kept, kept)})


def test_the_seeds_of_a_family_share_a_line_with_one_interval(monkeypatch, tmp_path):
    for module in (retrain, shapes):
        monkeypatch.setattr(module, "STORED", tmp_path)
    right = [np.random.default_rng(seed).random((2, 500)) < 0.7 for seed in range(2)]
    for seed, correct in enumerate(right):
        _finish(tmp_path, f"shapes-teacher-{seed}", 50 + 10 * seed, correct[:1])
        _finish(tmp_path, f"shapes-waveclip-{seed}", 40, correct)
    teacher, wave = (
        next(line for line in retrain.table().splitlines() if f"{name}, 2 of 3 seeds" in line)
        for name in ("shapes-teacher", "shapes-waveclip")
    )
    coarse, fine = (
        f"{100 * found.middle:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        for found in (mean_interval([correct[level] for correct in right]) for level in (0, 1))
    )
    assert teacher.startswith(f"| shapes-teacher, 2 of 3 seeds | 55 | – | {coarse} |")
    assert wave.startswith(f"| shapes-waveclip, 2 of 3 seeds | 40 | {coarse} | {fine} |")


def test_a_pattern_chooses_runs():
    assert [run.name for run in chosen("shapes-half-*")] == ["shapes-half-0", "shapes-half-1", "shapes-half-2"]
