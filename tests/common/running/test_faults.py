"""What can go wrong around a run is one sentence and an exit code, never a traceback; docs/faults.md lists it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.common.fresh import answers
from tests.common.running.command import STEPS, fit
from tests.readme import ROOT

HERE = "tests.common.running.trainings"
TABLE = (ROOT / "docs" / "faults.md").read_text()
ROWS = [row for row in TABLE.splitlines() if re.match(r"\| \d+ \|", row)]


@pytest.fixture(scope="module")
def trained(run, place):
    """The checkpoint of a finished run."""
    assert fit(run, place, "trained", 0).code == 0
    return max((place / "trained").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def damaged(place, trained):
    """A checkpoint of which half is missing."""
    half = place / "half.ckpt"
    half.write_bytes(trained.read_bytes()[: trained.stat().st_size // 2])
    return half


def test_the_table_has_twenty_faults_and_names_their_tests():
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, 21))
    for row in ROWS:
        for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", row.split("|")[4]):
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"
        assert "::" in row.split("|")[4], f"nothing tests: {row}"


SENTENCES = {
    "no GPU": (["--trainer.accelerator", "gpu"], "gpu"),
    "no W&B": (
        ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"],
        r"pip install '\.\[wandb\]' in the checkout",
    ),
    "no TensorBoard": (
        ["--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir", "tb"],
        r"pip install '\.\[tensorboard\]' in the checkout",
    ),
    "rate": (["--model.init_args.learning_rate", "-1"], r"learning_rate -1(\.0)? must be positive"),
    "decay": (["--model.init_args.weight_decay", "-1"], r"weight_decay -1(\.0)? must not be negative"),
    "warm-up": (["--model.init_args.warmup_steps", "-1"], "warmup_steps -1 must not be negative"),
    "nothing to go on with": (["--resume", "nobody"], "no checkpoint below"),
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_a_wrong_setting_is_one_sentence(run, place, fault):
    words, sentence = SENTENCES[fault]
    ended = fit(run, place, "sentences", 0, *words)
    assert ended.code == 1, ended.printed
    (line,) = [text for text in ended.printed.splitlines() if text.startswith("lightning: error: ")]
    assert re.search(sentence, line)


def test_a_damaged_checkpoint_is_one_sentence(run, place, damaged):
    empty = place / "empty.ckpt"
    empty.touch()
    for path in (damaged, empty):
        ended = fit(run, place, "damaged", 0, "--ckpt_path", path)
        assert ended.code == 1 and f"{path} is damaged, or no checkpoint" in ended.printed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_is_one_sentence_also_from_a_worker(run, place, workers):
    whole = sorted((place / "shards").glob("*.tar"))
    cut = place / f"cut{workers}"
    cut.mkdir()
    for shard in whole:
        (cut / shard.name).write_bytes(shard.read_bytes()[:700])
    pattern = f"{cut}/{{000..003}}.tar"
    words = ["--data.init_args.train_shards", pattern, "--data.init_args.train_num_samples", "24"]
    ended = fit(run, place, "cut", workers, *words)
    assert ended.code == 1
    assert f"lightning: error: no sample can be read in 4 of 4 shards, first {cut}/000.tar" in ended.printed


def test_a_run_directory_that_takes_no_files_is_one_sentence(run):
    ended = fit(run, Path("/proc"), "runs", 0)
    assert ended.code == 1 and "lightning: error: /proc/runs: " in ended.printed


def test_a_small_tmpdir_costs_nothing(run, place):
    assert fit(run, place, "tmpdir", 0, TMPDIR=str(place / "nowhere")).code == 0


def test_nan_stops_at_its_step_and_leaves_finite_weights(run, place):
    ended = fit(run, place, "nan", 0, "--model", f"{HERE}.Spoiled")
    assert ended.code == 1
    assert re.search(r"step 5: the loss is nan .* at learning rate [\d.e-]+;", ended.printed)
    newest = max((place / "nan").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    checkpoint = torch.load(newest, weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values() if value.is_floating_point())


def test_last_without_a_checkpoint_is_an_error(run, place):
    ended = fit(run, place, "none", 0, "--ckpt_path", "last")
    assert ended.code == 1 and "no checkpoint below" in ended.printed


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_measured_only_when_asked_for(run, command):
    line = [command, "-c", "tiny.yaml"]
    ended = run(*line, EFFCLIP_RUNS="random")
    assert ended.code == 1 and "would measure random ones" in ended.printed
    if command == "validate":
        assert run(*line, "--random-weights", EFFCLIP_RUNS="random").code == 0


def test_what_is_typed_wins_over_the_checkpoint_in_the_optimiser_too(run, place, trained):
    words = ["--model.init_args.learning_rate", "0.01", "--model.init_args.weight_decay", "0.05"]
    ended = fit(run, place, "typed", 0, "--ckpt_path", trained, "--trainer.max_steps", 2 * STEPS, *words)
    assert ended.code == 0, ended.printed
    assert "learning rate was 0.001, is 0.01" in ended.printed and "weight_decay was 0.2, is 0.05" in ended.printed
    newest = max((place / "typed").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    checkpoint = torch.load(newest, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.01}
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.05]
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [0.01] * len(groups)
    (record,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("RunRecord")]
    assert record["model"]["init_args"]["learning_rate"] == 0.01
    assert "model.init_args.learning_rate was 0.001, is 0.01" in record["changed"]


@pytest.mark.parametrize(
    "words",
    [["--trainer.fast_dev_run", "true"], ["--trainer.overfit_batches", "1", "--trainer.max_epochs", "2"]],
    ids=["fast_dev_run", "overfit_batches"],
)
def test_dry_runs_shorten_the_warm_up_with_a_note(run, place, words):
    ended = fit(run, place, "dry", 0, "--model.init_args.warmup_steps", "7", "--trainer.max_steps", "-1", *words)
    assert ended.code == 0, ended.printed
    assert re.search(r"dry run of \d steps: warmup_steps \d instead of 7", ended.printed)


def test_a_checkpoint_of_another_optimiser_is_one_sentence_and_leaves_no_checkpoint(run, place, trained):
    """A newer one would be found by the next --ckpt_path last."""
    words = ["--ckpt_path", "last", "--trainer.max_steps", STEPS + 1, "--model.init_args.optimizer", "muon"]
    ended = fit(run, place, "trained", 0, *words)
    assert ended.code == 1
    assert "made with optimizer adamw, this training has optimizer muon; set optimizer to adamw" in ended.printed
    assert max((place / "trained").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns) == trained


def test_no_checkpoint_at_all_is_an_error_at_the_end(run, place):
    (place / "refused").mkdir()
    (place / "refused" / "tiny").write_text("a file where the run's folder belongs")
    ended = fit(run, place, "refused", 0)
    assert ended.code == 1 and "refused" in ended.printed


def test_a_run_says_where_its_files_are_and_what_comes_next(run, place, trained):
    (metrics,) = (place / "trained").rglob("metrics.jsonl")
    steps = [yaml.safe_load(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == STEPS - 1
    resumed = fit(run, place, "trained", 0, "--ckpt_path", "last", "--trainer.max_steps", STEPS + 1)
    assert re.search(r"^checkpoint +\S+\.ckpt$", resumed.printed, re.M)
    assert re.search(r"^metrics +\S+metrics\.csv$", resumed.printed, re.M)


def test_a_typing_mistake_is_answered_before_anything_heavy_is_imported(tmp_path):
    lines = (
        ("fit -c waveclip/shaped.yaml", 1, "did you mean waveclip/shapes.yaml"),
        ("fot -c waveclip/shapes.yaml", 2, "did you mean fit"),
        ("fit -c waveclip/shapes.yaml --ckpt_path nowhere.ckpt", 1, "no checkpoint at"),
        ("convert nowhere.ckpt model", 1, "no checkpoint at"),
        ("fit --trainer.max_steps 4", 1, "fit needs a recipe: -c FILE.yaml, such as -c common/shapes_clip.yaml"),
        ("classify x.jpg --treshold 0.3", 2, "unrecognized arguments: --treshold 0.3; did you mean --threshold?"),
        ("evaluate --modell m --data embedded", 2, "did you mean --model?"),
        ("evaluate --model ViT-B16 --data embedded", 1, "no open_clip model; did you mean ViT-B-16?"),
        ("export runs/none --format onnx", 1, "no model at"),
    )
    found = answers([line.split() for line, _, _ in lines], tmp_path)
    for (_, code, sentence), answer in zip(lines, found, strict=True):
        assert answer.code == code and sentence in answer.printed
        assert not answer.imported & {"torch", "lightning", "numpy"}, "a heavy import"


def test_a_closed_pipe_is_silent(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -m common.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stdout + done.stderr == ""
