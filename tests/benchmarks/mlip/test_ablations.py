"""The rows of MLIP's ablations as command lines, their evaluation, and the tables made from results."""

import json

import pytest
import torch
from scipy.stats import ttest_1samp

from benchmarks.cells import student_interval
from benchmarks.mlip import ablations as mlip_ablations
from benchmarks.mlip.ablations import (
    BASELINE,
    COMMAND,
    MODEL,
    RECIPE,
    RECIPES_OF_BASELINES,
    ROWS,
    TABLES,
    batch_size,
    evaluate,
    rows_of,
    runs,
)
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from benchmarks.training.run import RECIPES
from common.cli import main as lightning
from common.clip import CLIP
from common.data.embedded.module import SPLITS
from common.data.lookup import Captioned, Labelled
from common.testing import TINY_CAPTIONS, tiny_architecture
from mlip.guide import Guide
from mlip.model import MLIP
from mlip.pretraining import MLIPPretraining


@pytest.mark.parametrize("run", runs(ROWS)[: len(ROWS)], ids=lambda run: run.name)
def test_every_row_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_rows_are_trained_once_and_all_together_keep_to_the_budget():
    every = runs(ROWS)
    assert sum(run.minutes for run in every) <= 480 and max(run.minutes for run in every) <= 4
    assert len({run.name for run in every}) == len(every) == 3 * len(ROWS)
    assert {name for table in TABLES for name in rows_of(table)} == set(ROWS)
    settings = [(RECIPES_OF_BASELINES.get(name), sorted(row.items(), key=str)) for name, row in ROWS.items()]
    assert len(set(map(str, settings))) == len(ROWS), "two rows are the same training"


def test_a_row_that_reads_fewer_pictures_sees_them_again():
    shown = runs(ROWS)[0].steps * batch_size()
    fractions = {changed["train_fraction"] for changed in ROWS.values() if "train_fraction" in changed}
    assert fractions and all(shown > fraction * SPLITS[1]["train"][0] for fraction in fractions)


@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if "train_fraction" not in row and name not in RECIPES_OF_BASELINES]
)
def test_no_loss_of_a_row_has_a_zero_gradient(name, tmp_path):
    guide = Guide(image_size=16, patch_size=8, width=32, depth=1, heads=2)
    guide.save(tmp_path / "guide.safetensors")
    small = {"frequency_layers": 1, "keep_rates": {2: 0.5}, "guide": str(tmp_path / "guide.safetensors")}
    torch.manual_seed(0)
    module = MLIPPretraining(tiny_architecture(tmp_path), **small | ROWS[name])
    text = module.clip.tokenizer(list(TINY_CAPTIONS), longest=True)
    batch = {"image": torch.randn(6, 3, 32, 32), "text": text, "caption_id": torch.arange(6)}
    module.losses(batch)  # fills the queue of neighbours
    terms = module.losses(batch)
    assert terms.keys() == {term for term, weight in module.weights.items() if weight}
    for term, value in terms.items():
        first = module.clip.text_tower.token_embedding if term == "masking" else module.clip.image_tower.vit.conv1
        (gradient,) = torch.autograd.grad(value, first.weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_two_runs_give_the_weights_of_the_figures():
    committed = {run.name: run for run in runs(ROWS) if run.output}
    assert {name: run.output for name, run in committed.items()} == {
        "mlip/clip-seed0": BASELINE,
        "mlip/mlip-seed0": MODEL,
    }
    assert all(run.target == f"{COMMAND} --only {name.removeprefix('mlip/')}" for name, run in committed.items())


def test_one_run_alone_and_one_that_is_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    assert mlip_ablations.main(["--only", "mlip-seed1", "--list"]) == 0
    assert capsys.readouterr().out.count("lightning fit") == 1
    with pytest.raises(ValueError, match="--only mlip-seed7 is no run here"):
        mlip_ablations.main(["--only", "mlip-seed7", "--list"])


def test_listing_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    (tmp_path / "retrain/mlip/clip-seed0").mkdir(parents=True)
    (tmp_path / "retrain/mlip/clip-seed0/result.json").write_text("{}")
    monkeypatch.setattr("benchmarks.training.run.train", lambda *_, **__: pytest.fail("it trained"))
    assert mlip_ablations.main(["--table", "6", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "mlip/clip-seed0         finished" in printed and printed.count(f"about {RECIPES[RECIPE]} min") == 17


def test_a_models_result_has_every_column(monkeypatch, tmp_path):
    clip = MLIP(CLIP.tiny().architecture, frequency_layers=1, keep_rates={2: 0.5})
    clip.save(tmp_path / "weights.safetensors")
    images = torch.randn(6, 3, 32, 32)

    def loader(preprocess, batch_size, workers):
        return [{"image": images, "label": torch.arange(6), "key": list("abcdef")}]

    def source(name, task, split=None):
        if task == "retrieval":
            return Captioned("retrieval", [[caption] for caption in TINY_CAPTIONS], loader)
        return Labelled(split, [caption[2:] for caption in TINY_CAPTIONS], ("a {}",), "accuracy", loader)

    monkeypatch.setattr(mlip_ablations, "source", source)
    monkeypatch.setattr(mlip_ablations.retrain, "batches", lambda split, pictures, size, revision: loader(size, 6, 0))
    monkeypatch.setattr(mlip_ablations.retrain, "prompts", lambda revision: list(TINY_CAPTIONS))
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    result = json.loads(json.dumps(evaluate(tmp_path / "weights.safetensors", RECIPE)))
    with torch.no_grad():
        guess = (clip.eval().encode_image(images) @ clip.encode_text(clip.tokenizer(list(TINY_CAPTIONS))).T).argmax(1)
    right = pytest.approx((guess == torch.arange(6)).float().mean().item())
    assert result["test"]["top1"]["accuracy"] == right
    assert result["unseen"]["top1"] == right and result["unseen"]["names"] == 6 and result["gmacs"] > 0
    assert result["retrieval"]["image_to_text"]["R@1"] == right


def result(seed, top1, steps=450):
    """What a run's file holds, as far as tables read it."""
    recall = {"R@1": top1 / 2}
    return {
        "name": f"mlip/some-seed{seed}",
        "steps": steps,
        "conditions": {"seed": seed, "revision": "abc"},
        "gmacs": 0.02,
        "test": {"top1": {"accuracy": top1}},
        "unseen": {"top1": top1 / 10},
        "unseen-alone": {"top1": top1 / 4},
        "retrieval": {"image_to_text": recall, "text_to_image": recall},
    }


@pytest.fixture
def rendered(monkeypatch, tmp_path):
    """The Markdown of a table of these runs; all other rows have none."""

    def render(number, **known):
        monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
        monkeypatch.setattr(mlip_ablations, "results", lambda _: {name: [] for name in ROWS} | known)
        table = benchmark(f"mlip-table{number}").load()
        return table.render(json.loads(json.dumps(table.run(smoke=True))))["md"]

    return render


def test_tables_show_spread_and_paired_differences(rendered):
    clip = [result(0, 0.30), result(1, 0.32), result(2, 0.34)]
    text = rendered(6, clip=clip, frequency=[result(0, 0.31), result(1, 0.34), result(2, 0.37)])
    ours = "0, 1, 2 | 16.0 ± 1.0 | 16.0 ± 1.0 | 32.0 ± 2.0 | 3.2 ± 0.2 | 8.0 ± 0.5 | 0.0200"
    assert f"| CLIP | 10.4 | 6.6 | 16.3 | {ours} |" in text and "| 34.0 ± 3.0 |" in text
    # 1, 2 and 3 points, seed by seed: Student's interval of three is ± 4.303 deviations / √3.
    differences = "+1.0 [-0.2, +2.2] | +1.0 [-0.2, +2.2] | +2.0 [-0.5, +4.5] | +0.2 ["
    assert f"| + frequency transform | 0, 1, 2 | {differences}" in text
    assert "beside CLIP: no clear difference: + frequency transform." in text


def test_a_clear_difference_is_called_one(rendered):
    clip = [result(0, 0.30), result(1, 0.32), result(2, 0.34)]
    tokens = [result(0, 0.35), result(1, 0.371), result(2, 0.389)]
    text = rendered(6, clip=clip, tokens=tokens, **{"late-interaction": [result(0, 0.2), result(1, 0.22)]})
    assert "better: + token alignment (one-to-many); worse: InfoNCE + late interaction." in text


def test_a_single_seed_has_neither_deviation_nor_interval_nor_judgement(rendered):
    text = rendered(8, mlip=[result(0, 0.5)], clip=[result(0, 0.4)])
    assert "| MLIP | 14.6 | 9.3 | 18.4 | 0 | 25.0 | 25.0 | 50.0 | 5.0 | 12.5 | 0.0200 |" in text
    assert "| CLIP | 0 | -5.0 | -5.0 | -10.0 | -1.0 | -2.5 |" in text
    assert "Zero-shot accuracy beside MLIP: one seed alone: CLIP." in text
    assert "Not run: seeds 1, 2 of CLIP, MLIP; seeds 0, 1, 2 of " in text and ", MLIP without Guide. " in text


def test_differences_are_of_the_seeds_that_both_rows_have(rendered):
    text = rendered(8, mlip=[result(0, 0.5), result(1, 0.6), result(2, 0.1)], clip=[result(1, 0.5), result(0, 0.3)])
    change, half = -15.0, 100 * 12.706 * 0.05  # of -20 and -10 points: Student's quantile of one degree of freedom
    assert f"| CLIP | 1, 0 | -7.5 [-39.3, +24.3] | -7.5 [-39.3, +24.3] | {change:+.1f} [{change - half:+.1f}," in text
    assert "Not run: seed 2 of CLIP; seeds 0, 1, 2 of " in text and ", MLIP without Guide. `python -m" in text
    text = rendered(8, mlip=[result(0, 0.5)], clip=[result(1, 0.5)])
    assert "points [95 %]" not in text  # no pair


def test_notes_state_the_runs_own_length(rendered):
    assert "(300 steps of 128 of the 60,000 training pictures)" in rendered(3, mlip=[result(0, 0.5, steps=300)])
    assert "in a queue of 16 batches" in rendered(5)
    assert " steps of " not in rendered(5)


def test_runs_of_different_lengths_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(mlip_ablations, "RESULTS", tmp_path)
    (tmp_path / "clip-seed0.json").write_text(json.dumps(result(0, 0.5)))
    assert [run["steps"] for run in mlip_ablations.results()["clip"]] == [450]
    (tmp_path / "mlip-seed1.json").write_text(json.dumps(result(1, 0.5, steps=300)))
    with pytest.raises(ValueError, match="300 steps: mlip/some-seed1; 450 steps: mlip/some-seed0"):
        mlip_ablations.results()


def test_intervals_over_seeds_are_scipys():
    differences = [0.01, 0.03, 0.02, 0.05]
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert student_interval(differences) == pytest.approx((0.0275, *expected))


@pytest.mark.parametrize("table", TABLES)
def test_every_table_can_be_made_before_anything_is_run(table, rendered):
    text = rendered(table)
    for row in paper_numbers("mlip")[f"table{table}"]:
        assert (f"| {row['method']} |" in text) == ("run" in row)
        at_paper_scale = f"| {row.get('title', row['method'])}, paper |"
        assert (at_paper_scale in text) == (at_paper_scale.replace("paper", "ours") in text) == ("model" in row)
    assert "| not run | not run |" in text and f"mlip-ablations --table {table}" in text
