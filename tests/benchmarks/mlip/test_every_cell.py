"""A dry run of MLIP's tables: made-up results of every training and evaluation fill every cell of all ten."""

import importlib
import inspect
import json
import shlex

import numpy as np
import pytest
import torch
import yaml

from benchmarks import RESULTS
from benchmarks.mlip import dry_run, shapes_runs, table9, table10
from benchmarks.mlip.dry_run import NUMBERS, cells, unfilled, wanted
from benchmarks.mlip.paper_scale import COLUMNS, MODELS, Column, cell, result_of, stored
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from common import directory
from common.cli import main as effclip
from common.clip import CLIP
from common.data.embedded import module as embedded
from common.data.embedded.shapes import vocabulary
from tests.benchmarks.mlip.test_shapes import drawn
from tests.benchmarks.mlip.test_tables_1_2_4 import result as evaluated
from tests.readme import ROOT

RECALLS = {side: {f"R@{k}": 0.25 for k in (1, 5, 10)} for side in ("image_to_text", "text_to_image")}
MEASURED = {
    "zeroshot": {"top1": 0.25, "mean_per_class": 0.3},
    "linear-probe": {"shots": {"full": {"top1": 0.5, "mean_per_class": 0.6}}},
    "retrieval": RECALLS,
    "device_hours": 0.1,
    "gmacs": 0.09,
}
"""What a miniature gives."""


@pytest.fixture
def counted(monkeypatch):
    """The costs are the committed ones, and no time is measured."""
    costs = json.loads((RESULTS / "mlip-table9.json").read_text())["rows"]
    known = {(row["architecture"], row["method"]): row for row in costs}
    monkeypatch.setattr(table9, "row", lambda name, method: known[name, method])
    monkeypatch.setattr(table10, "built", lambda *_: (torch.nn.Identity(), None))
    monkeypatch.setattr(table10, "_batch", lambda *_: {"image": torch.zeros(128, 1)})
    monkeypatch.setattr(table10, "train_step", lambda *_: None)
    monkeypatch.setattr(table10, "alternate", lambda steps, rounds: {key: {"seconds": 0.2} for key in steps})
    monkeypatch.setattr(table10, "ratio", lambda one, other: 1.0)


@pytest.fixture
def everything(tmp_path, counted):
    """The folder of a dry run with results of all trainings and evaluations, each of another value."""
    (tmp_path / "evaluations").mkdir()
    for place, (model, data, task) in enumerate(sorted(each for each in set(wanted()) if each[0])):
        made = evaluated(model, data, task, 0.2 + place / 1000)
        made["conditions"]["device_hours"] = 100.0 + place
        (tmp_path / "evaluations" / f"{place}.json").write_text(json.dumps(made))
    (tmp_path / "trained").mkdir()
    for row in shapes_runs.BY_NAME:
        for seed, (made, answers) in enumerate(drawn(0.4)):
            (tmp_path / "trained" / f"{row}-{seed}.json").write_text(json.dumps(made))
            np.savez_compressed(tmp_path / "trained" / f"{row}-{seed}.npz", **answers)
    return tmp_path


@pytest.mark.parametrize("number", NUMBERS)
def test_every_cell_is_filled_but_those_that_the_paper_leaves_empty(number, everything):
    entry = benchmark(f"mlip-table{number}")
    maker = entry.load()
    result = json.loads(json.dumps(maker.run(dry=everything)))
    text = maker.render(result)["md"]
    assert unfilled(number, text) == []
    assert "Not run: " not in text and "Not all of " not in text
    assert entry.missing(result) == []
    assert all(number.elsewhere for number in entry.compare(result) if number.ours is None)


def test_the_page_of_a_dry_run_says_that_its_numbers_mean_nothing(tmp_path, monkeypatch, counted, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setattr(dry_run, "miniature", lambda folder, kind: MEASURED)
    assert dry_run.main() == 0
    assert "every cell of 10 tables is filled" in capsys.readouterr().out
    page = (tmp_path / "dry-run" / "report.html").read_text()
    assert dry_run.NOTICE in page and all(f'id="mlip-table{number}"' in page for number in NUMBERS)


def test_a_dry_run_names_the_cell_that_stays_empty(tmp_path, monkeypatch, counted):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setattr(dry_run, "miniature", lambda folder, kind: {})
    monkeypatch.setattr(dry_run, "file_results", lambda folder, measured: folder.mkdir())
    with pytest.raises(ValueError, match="Table 1 has no number in CLIP B/32, ours / zero-shot"):
        dry_run.main()


def test_a_dry_run_reads_each_set_by_the_metric_of_the_catalogue(tmp_path):
    dry_run.file_results(tmp_path, dict.fromkeys(dry_run.RECIPES, MEASURED))
    known = stored(tmp_path)
    numbers = {"imagenet": 25.0, "food101": 25.0, "oxford_pets": 30.0, "fgvc_aircraft": 30.0}
    assert {data: cell(known, "slip-b32", Column(data, data, "zeroshot")) for data in numbers} == numbers
    assert cell(known, "slip-b32", Column("PETS", "oxford_pets", "linear-probe")) == 60.0


@pytest.mark.filterwarnings("ignore")
def test_a_miniature_is_trained_converted_and_evaluated_on_what_the_tables_read_of_its_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    measured = dry_run.miniature(tmp_path, "filip")  # `make smoke` has the others
    assert measured.keys() == {"zeroshot", "device_hours"}
    assert 0 <= measured["zeroshot"]["mean_per_class"] <= 1


def test_what_is_printed_only_has_no_line_of_ours(everything):
    maker = benchmark("mlip-table4").load()
    rows = {row for row, *_ in cells(maker.render(maker.run(dry=everything))["md"])}
    assert "UniCLIP B/32, paper" in rows and "UniCLIP B/32, ours" not in rows and "MLIP B/16, ours" in rows


def test_numbers_stand_where_their_models_results_say(everything):
    known = stored(everything)
    for number, row, key in ((6, 1, "i2t"), (5, 2, "lp_b32"), (3, 2, "top1")):
        printed = paper_numbers("mlip")[f"table{number}"][row]
        maker = benchmark(f"mlip-table{number}").load()
        column = COLUMNS[key]
        ours = 100 * column.read(result_of(known, printed[column.model], column))
        assert maker.run(dry=everything)["rows"][row]["evaluated"][key] == ours
        assert [
            each.ours for each in maker.compare(maker.run(dry=everything)) if each.paper == printed[key] and each.same
        ] == [ours]
    ours = table10.run(dry=everything)["evaluated"]["MLIP"]
    assert ours["ratio"] == pytest.approx(ours["accuracy"] / ours["gpu_hours"] * 32)


def test_every_model_is_in_a_table_and_every_row_has_a_model():
    assert {model for model, *_ in wanted() if model} == set(MODELS)
    absent = [row["method"] for row in paper_numbers("mlip")["table4"] if "model" not in row]
    assert absent == ["UniCLIP B/32"]


@pytest.mark.parametrize("name", MODELS)
def test_every_line_changes_settings_that_its_recipe_has(name):
    training, sections = MODELS[name], {"model": {}, "data": {}, "trainer": {}}
    for file in training.files:
        for section, content in yaml.safe_load((ROOT / file).read_text()).items():
            if section in sections:
                sections[section] |= content.get("init_args", {}) | {
                    k: v for k, v in content.items() if k != "init_args"
                }
    for section, changes in training.settings.items():
        module, _, attribute = sections[section]["class_path"].rpartition(".")
        known = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        assert changes.keys() <= known.keys()
    data, fraction = sections["data"], training.settings.get("data", {}).get("train_fraction", 1)
    steps = training.steps or sections["trainer"]["max_steps"]
    epochs = 32 if name.endswith(("-b32", "-b16")) else 25
    assert steps == int(data["train_num_samples"] * fraction * epochs / data["global_batch_size"])


@pytest.mark.parametrize("name", ["mlip-cc3m-95", "frequency-cc3m"])
def test_a_line_is_a_command_that_lightning_accepts(name, capsys):
    words = shlex.split(MODELS[name].line)
    assert words[:2] == ["lightning", "fit"]
    with pytest.raises(SystemExit) as stop:
        effclip([*words[1:], "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err
    stated = yaml.safe_load(capsys.readouterr().out)
    assert stated["data"]["init_args"]["train_fraction"] == (0.95 if name == "mlip-cc3m-95" else 1.0)
    assert (stated["model"]["init_args"]["guide"] is None) == (name == "frequency-cc3m")


def test_a_table_reads_what_evaluate_writes_for_a_model_directory(tmp_path, monkeypatch):
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    monkeypatch.setitem(embedded.SPLITS, 2, sizes)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    kept = vocabulary()
    text = {"context_length": 32, "vocab_size": len(kept), "vocabulary": kept, "width": 32, "heads": 1, "layers": 1}
    vision = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32}
    clip = CLIP({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    directory.write(tmp_path / "clip-b16", clip, None, run={"device_hours": 361.0})
    line = ["evaluate", "--model", str(tmp_path / "clip-b16"), "--data", "embedded", "--device", "cpu"]
    line += ["--features", "penultimate", "--tasks", "zeroshot,retrieval,linear-probe"]
    assert effclip(line) == 0
    known = [json.loads(path.read_text()) for path in (tmp_path / "evaluations").glob("*.json")]
    for task, recall in (("zeroshot", None), ("linear-probe", None), ("retrieval", ("image_to_text", "R@1"))):
        (written,) = (result for result in known if result["task"] == task)
        metrics = written["metrics"]
        fraction = {"retrieval": lambda m: m["image_to_text"]["R@1"], "zeroshot": lambda m: m["top1"]}.get(
            task, lambda m: m["shots"]["full"]["top1"]
        )(metrics)
        assert cell(known, "clip-b16", Column(task, "embedded", task, recall)) == pytest.approx(100 * fraction)
        assert written["conditions"]["device_hours"] == 361.0
