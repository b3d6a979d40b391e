"""MLIP from scratch on scenes of shape: the trainings, the choice on val, and the table from drawn answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import read_log, read_recipe
from benchmarks.mlip import shapes, shapes_runs
from benchmarks.mlip.shapes_runs import BY_NAME, CLIP, MLIP_ROW, ROWS, SHAPES, TEXTURES, trials
from benchmarks.together.embedded_reference import TOWERS
from benchmarks.training.drift import built
from benchmarks.training.export import save
from benchmarks.training.run import folder_of
from common.cli import main as lightning
from common.data.embedded import module as embedded
from common.optim import parameter_groups
from mlip.fourier import FourierBlock

CHOSEN = {
    CLIP: {"learning_rate": 1e-3, "weight_decay": 0.5},
    MLIP_ROW: {"learning_rate": 2e-3, "weight_decay": 0.1},
}
RUNS = {run.name.removeprefix("mlip-shapes/"): run for run in shapes_runs.rows(CHOSEN)}


@pytest.mark.parametrize("row", ["clip", "no-guide", "mlip-part", "declip", "texture-frequency"])
def test_a_row_is_a_command_that_lightning_accepts(row, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *RUNS[f"{row}-1"].arguments(), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_rows_take_the_rate_and_decay_chosen_with_their_tower():
    for name, row in BY_NAME.items():
        settings = RUNS[f"{name}-0"].settings["model"]
        assert CHOSEN[row.chosen_with].items() <= settings.items()
        changed = row.settings.get("model", {})
        plain = row.recipe not in (SHAPES, TEXTURES) or changed.get("frequency_layers") == 0
        assert (row.chosen_with == CLIP) == plain


def test_all_rows_are_trained_alike_and_as_often_over_their_pictures_as_the_protocol_says():
    recipes = {row.recipe: read_recipe(row.recipe) for row in ROWS}
    reference = recipes[SHAPES]
    for name, recipe in recipes.items():
        if name == TEXTURES:
            continue
        assert recipe["trainer"] == reference["trainer"]
        views = {"image_views", "text_view"}
        data = {key: value for key, value in recipe["data"]["init_args"].items() if key not in views}
        assert data == reference["data"]["init_args"]
        shared = ("architecture", "learning_rate", "weight_decay", "warmup_steps", "optimizer")
        assert all(recipe["model"]["init_args"][key] == reference["model"]["init_args"][key] for key in shared)
        assert "weights" not in recipe["model"]["init_args"], "from scratch"
    pictures, per_shard = embedded.SPLITS[2]["train"]
    data = embedded.EmbeddedDataModule(**reference["data"]["init_args"])
    read = per_shard * len(data.part("train", range(pictures // per_shard)))
    assert read == 60_000 and reference["trainer"]["max_steps"] == 1550
    part = RUNS["mlip-part-0"]
    fewer = embedded.EmbeddedDataModule(**reference["data"]["init_args"] | part.settings["data"])
    fewer_read = per_shard * len(fewer.part("train", range(pictures // per_shard)))
    assert fewer_read / read == part.steps / RUNS["mlip-0"].steps == 0.9
    textures = recipes[TEXTURES]
    assert textures["trainer"]["max_steps"] == 6 * (embedded.SPLITS[3]["train"][0] // 128)
    for part, key in (("model", "learning_rate"), ("model", "weight_decay"), ("model", "optimizer")):
        assert textures[part]["init_args"][key] == reference[part]["init_args"][key]
    assert textures["trainer"]["precision"] == reference["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("row", [row.name for row in ROWS if row.name.endswith(("clip", "mlip", "filip"))])
def test_muon_steps_all_matrices_of_a_rows_blocks(row):
    """Of all kinds of blocks, so that no row has less of it: what is left to AdamW stands outside of them."""
    run = RUNS[f"{row}-0"]
    module, _ = built(run.recipe, {"model": run.settings["model"] | {"guide": None}} if row == "mlip" else run.settings)
    groups = parameter_groups(module, 1e-3, 0.1, optimizer=module.optimizer_name)
    stepped = {id(p) for group in groups if group["muon"] for p in group["params"]}
    left = {name for name, p in module.named_parameters() if p.ndim == 2 and p.requires_grad and id(p) not in stepped}
    assert len(stepped) > 20 and not [name for name in left if "resblocks" in name or "fourier" in name]


def test_both_rows_have_as_many_trials_and_all_runs_fit_the_budget():
    of = {row: [run for _, run in trials(row)] for row in (CLIP, MLIP_ROW)}
    assert len(of[CLIP]) == len(of[MLIP_ROW]) == 6
    every = [shapes_runs.GUIDE, *of[CLIP], *of[MLIP_ROW], *RUNS.values()]
    assert len({run.name for run in every}) == len(every) == 79
    assert sum(run.minutes for run in every) <= 12 * 60
    assert all(2 * run.steps == read_recipe(SHAPES)["trainer"]["max_steps"] for run in of[CLIP])


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The folder of stored results, empty."""
    monkeypatch.setattr(shapes_runs, "STORED", tmp_path)
    (tmp_path / "mlip-shapes").mkdir()
    return tmp_path


def finish(folder, row, best):
    """Results of a row's trials of which number ``best`` has the highest accuracy on val."""
    for number, (_, run) in enumerate(trials(row)):
        made = {"val": {"top1": {"accuracy": 0.1 + 0.01 * (number == best)}}}
        (folder / f"{run.name}.json").write_text(json.dumps(made))


def test_the_best_trial_of_each_row_is_chosen_once_all_are_finished(stored):
    finish(stored, CLIP, 4)
    assert shapes_runs.choice() is None
    finish(stored, MLIP_ROW, 1)
    assert shapes_runs.choice() == {
        CLIP: {"learning_rate": 4e-3, "weight_decay": 0.1},
        MLIP_ROW: {"learning_rate": 1e-3, "weight_decay": 0.5},
    }


def test_the_listing_has_the_rows_wait_for_the_trials(stored, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    assert shapes_runs.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "mlip-shapes/guide" in printed and "66 runs of rows" in printed and "wait for the trials" in printed
    finish(stored, CLIP, 0)
    finish(stored, MLIP_ROW, 0)
    assert shapes_runs.main(["--list", "--only", "frequency-[02]"]) == 0
    printed = capsys.readouterr().out
    assert "chosen on val with mlip: learning_rate 0.001, weight_decay 0.1" in printed
    assert printed.count("lightning fit") == 2
    with pytest.raises(ValueError, match="--only frequncy-0 is no run here"):
        shapes_runs.main(["--only", "frequncy-0"])


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Few scenes, packed into a folder of their own; reads of test are logged there too."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setattr(read_log, "LOG", tmp_path / "reads.jsonl")
    sizes = {"train": (40, 10), "val": (16, 8), "test": (12, 6)}
    monkeypatch.setitem(embedded.SPLITS, 2, sizes | {"unseen": (6, 3), "retrieval": (9, 3)})
    monkeypatch.setitem(embedded.SPLITS, 3, sizes)
    return tmp_path


def test_the_terms_of_heads_that_are_not_kept_are_those_of_the_last_tenth_of_the_training(tmp_path):
    """Of a training that was interrupted and went on."""
    for version, lines in enumerate((["0,9.0,8.0,17.0,", "50,4.0,2.0,6.0,"], ["95,1.0,,1.0,", "99,2.0,0.5,2.5,0.3"])):
        (tmp_path / f"version_{version}").mkdir()
        text = "\n".join(["step,train_clip_loss,train_simclr_loss,train_loss,val_top1", *lines])
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(text)
    found = shapes_runs.logged_terms(tmp_path)
    assert found == {"clip in training": 1.5, "simclr in training": 0.5}
    assert shapes_runs.logged_terms(tmp_path / "nothing") == {}


@pytest.mark.parametrize("row", ["no-guide", "masking", "texture-frequency", "filip"])
def test_a_trained_row_leaves_its_answers_and_what_its_terms_do(row, few):
    torch.manual_seed(0)
    run = RUNS[f"{row}-0"]
    run = replace(run, settings={"model": run.settings["model"] | {"guide": None}})  # its weights are not trained yet
    module, _ = built(run.recipe, run.settings)
    save(module, few / "weights.safetensors")
    splits, file = BY_NAME[row].splits, few / "made" / "answers.npz"
    logs = folder_of(run) / "version_0"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text("step,train_frequency_loss,train_masking_loss\n9,2.0,1.5\n" * (row == "masking"))
    result = shapes_runs.measure(few / "weights.safetensors", run.recipe, run, splits, file, batches=1)
    counts = {"test": 12, "unseen": 6, "i2t": 9, "t2i": 9}
    with np.load(file) as answers:
        kinds = counts if "retrieval" in splits else splits
        assert {kind: answers[kind].shape for kind in answers} == {kind: (counts[kind],) for kind in kinds}
        assert result["test"]["top1"]["accuracy"] == answers["test"].mean()
    assert "shapes" in (few / "reads.jsonl").read_text() or row.startswith("texture")
    expected = {
        "no-guide": {"frequency", "spatial", "frequency_token", "spatial_token", "frequency top1", "spatial top1"},
        "texture-frequency": {"frequency", "spatial", "frequency top1", "spatial top1"},
        "filip": set(),
    }
    expected["masking"] = expected["no-guide"] | {"masking in training"}  # the head that tells masked words is not kept
    assert result["terms"].keys() == expected[row]
    assert (row != "filip") == any(isinstance(part, FourierBlock) for part in module.modules())


def drawn(accuracy, seeds=3, gmacs=0.03, precision="bf16-mixed"):
    """Runs of a row whose answers on every split are right with this probability."""
    luck = np.random.default_rng(0).random(4000)  # hard pictures are hard for all
    runs = []
    for seed in range(seeds):
        right = 0.9 * luck + 0.1 * np.random.default_rng((seed, int(1000 * accuracy))).random(4000) < accuracy
        run_conditions = {"seed": seed, "precision": precision}
        result = {"conditions": run_conditions, "gmacs": gmacs, "minutes": 8.0, "terms": {"spatial": 3.0}}
        runs.append((result, dict.fromkeys(shapes_runs.ANSWERS, right)))
    return runs


def test_claims_are_paired_by_seed_and_corrected_over_the_table():
    found = {
        "clip": drawn(0.3),
        "mlip": drawn(0.4),
        "frequency": drawn(0.25),
        "slip": drawn(0.4),
        "tokens": drawn(0.5, 1),
    }
    claims = {tuple(claim["rows"]): claim for claim in shapes.claims(found, 200)}
    assert set(claims) == {("mlip", "clip"), ("frequency", "clip"), ("tokens", "clip"), ("mlip", "slip")}
    assert claims["mlip", "clip"]["verdict"] == "holds here" and claims["mlip", "clip"]["seeds"] == 3
    assert claims["frequency", "clip"]["verdict"] == "the opposite here"
    assert claims["mlip", "slip"]["verdict"] == "not shown" and claims["mlip", "slip"]["difference"][0] == 0
    assert claims["tokens", "clip"]["verdict"] == "one seed alone"


def test_rows_of_different_precision_are_not_compared():
    found = {"clip": drawn(0.3), "mlip": drawn(0.4, precision="32-true"), "frequency": drawn(0.25)}
    assert [claim["rows"] for claim in shapes.claims(found, 200)] == [["frequency", "clip"]]


def test_lightclips_additions_are_compared_beside_the_papers_claims():
    found = {"mlip": drawn(0.3), "growing-smoothing": drawn(0.4), "clip": drawn(0.3)}
    (beside,) = shapes.claims(found, 200, shapes.COMPARISONS)
    assert beside["rows"] == ["growing-smoothing", "mlip"] and beside["verdict"] == "holds here"
    assert [claim["rows"] for claim in shapes.claims(found, 200)] == [["mlip", "clip"]]


def test_the_reference_ladders_tower_of_revision_3_is_a_row_here():
    for tower in TOWERS[3]:
        (run,) = (run for run in RUNS.values() if run.output == tower.weights)
        assert run.recipe == TEXTURES and run.seed == 0 and run.target == tower.command


def test_every_row_is_trained_for_a_comparison():
    claims, comparisons = ({row for claim in part for row in claim[1:]} for part in (shapes.CLAIMS, shapes.COMPARISONS))
    beyond_the_paper = {"growing-smoothing", "masking", "frequency-linear", "late-interaction"}
    assert claims | comparisons == set(BY_NAME) and comparisons - claims == beyond_the_paper


def test_the_page_shows_what_is_trained_and_names_the_command_of_the_rest(stored, monkeypatch):
    finish(stored, CLIP, 0)
    finish(stored, MLIP_ROW, 3)
    (stored / "mlip-shapes" / "guide.json").write_text(json.dumps({"minutes": 2.0}))
    found = {row.name: drawn(0.3) for row in ROWS}
    monkeypatch.setattr(shapes, "known", lambda: found)
    result = json.loads(json.dumps(shapes.run(smoke=True)))
    page = shapes.render(result)["md"]
    assert list(shapes.missing(result)) == [] and "Not all" not in page
    assert "train with Muon and AdamW in bf16-mixed. " in page
    assert "| CLIP | **0.001** | **0.1** | **11.00** |" in page
    assert "| claim of the paper |" in page and "| no claim of the paper |" in page
    assert "training took 25 % of an MLIP row's minutes" in page and "| 3 | " in page
    found["slip"] = found["slip"][:2]
    result = shapes.run(smoke=True)
    assert list(shapes.missing(result)) == [("1 of 3 runs of slip", f"{shapes.COMMAND} --only 'slip-?'")]
    assert "`python -m benchmarks mlip-shapes-runs --only 'slip-?'`" in shapes.render(result)["md"]


def test_without_any_training_the_page_names_the_one_command(stored):
    result = shapes.run(smoke=True)
    assert shapes.render(result)["md"].startswith(f"None of its trainings is finished: `{shapes.COMMAND}`.")
