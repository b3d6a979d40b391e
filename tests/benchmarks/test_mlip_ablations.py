"""The rows of MLIP's ablations as command lines, their evaluation, and the tables made from results."""

import json

import pytest
import torch

from benchmarks import mlip_ablations
from benchmarks.__main__ import module_of
from benchmarks.mlip_ablations import ROWS, TABLES, evaluate, rows_of, runs
from benchmarks.mlip_table9 import paper
from common.cli import main as lightning
from common.clip import CLIP
from common.data.lookup import Captioned, Labelled
from common.testing import TINY_CAPTIONS
from mlip.model import MLIP


@pytest.mark.parametrize("run", runs(ROWS)[: len(ROWS)], ids=lambda run: run.name)
def test_every_row_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_rows_are_trained_once_and_all_together_keep_to_the_budget():
    every = runs(ROWS)
    assert sum(run.minutes for run in every) <= 150 and max(run.minutes for run in every) <= 3
    assert len({run.name for run in every}) == len(every) == 3 * len(ROWS)
    assert {name for table in TABLES for name in rows_of(table)} == set(ROWS)
    settings = [tuple(sorted(changed.items(), key=str)) for changed in ROWS.values()]
    assert len(set(map(str, settings))) == len(ROWS), "two rows are the same training"


def test_listing_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    (tmp_path / "retrain/mlip/clip-seed0").mkdir(parents=True)
    (tmp_path / "retrain/mlip/clip-seed0/result.json").write_text("{}")
    monkeypatch.setattr("benchmarks.retrain.train", lambda *_, **__: pytest.fail("it trained"))
    assert mlip_ablations.main(["--table", "6", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "mlip/clip-seed0         finished" in printed and printed.count("about 3 min") == 14


def test_a_models_result_has_every_column(monkeypatch, tmp_path):
    clip = MLIP(CLIP.tiny().architecture, frequency_layers=1, keep_rates={2: 0.5})
    clip.save(tmp_path / "weights.safetensors")
    images = torch.randn(6, 3, 32, 32)

    def loader(image_size, batch_size, workers):
        return [{"image": images, "label": torch.arange(6), "key": list("abcdef")}]

    def source(name, task, split=None):
        if task == "retrieval":
            return Captioned("retrieval", [[caption] for caption in TINY_CAPTIONS], loader)
        return Labelled(split, [caption[2:] for caption in TINY_CAPTIONS], ("a {}",), "accuracy", loader)

    monkeypatch.setattr(mlip_ablations, "source", source)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    found = json.loads(json.dumps(evaluate(tmp_path / "weights.safetensors")))
    with torch.no_grad():
        guess = (clip.eval().encode_image(images) @ clip.encode_text(clip.tokenizer(list(TINY_CAPTIONS))).T).argmax(1)
    assert found["test"]["top1"] == pytest.approx((guess == torch.arange(6)).float().mean().item())
    assert found["test"]["names"] == 6 and found["gmacs"] > 0
    assert found["retrieval"]["image_to_text"]["R@1"] == pytest.approx(found["test"]["top1"])


def result(seed, top1):
    """What a run's file holds, as far as tables read it."""
    recall = {"R@1": top1 / 2}
    return {
        "conditions": {"seed": seed, "revision": "abc"},
        "gmacs": 0.02,
        "test": {"top1": top1},
        "unseen-alone": {"top1": top1 / 4},
        "retrieval": {"image_to_text": recall, "text_to_image": recall},
    }


def test_tables_show_spread_paired_differences_and_what_was_not_run(monkeypatch):
    known = {name: [] for name in ROWS}
    known["clip"] = [result(0, 0.30), result(1, 0.32), result(2, 0.34)]
    known["frequency"] = [result(0, 0.31), result(1, 0.34), result(2, 0.37)]
    monkeypatch.setattr(mlip_ablations, "results", lambda: known)
    table = module_of("mlip-table6")
    text = table.render(json.loads(json.dumps(table.run(smoke=True))))["md"]
    assert "| CLIP | 10.4 | 6.6 | 16.3 | 16.0 ± 1.0 | 16.0 ± 1.0 | 32.0 ± 2.0 | 8.0 ± 0.5 | – | 0.0200 |" in text
    assert "| 34.0 ± 3.0 |" in text and "| +2.0 ± 1.0 | 0.0200 |" in text  # 1, 2 and 3 points, seed by seed
    assert text.count("| not run | not run |") > 0 and "mlip-ablations --table 6" in text


@pytest.mark.parametrize("table", TABLES)
def test_every_table_can_be_made_before_anything_is_run(table, monkeypatch):
    monkeypatch.setattr(mlip_ablations, "results", lambda: {name: [] for name in ROWS})
    module = module_of(f"mlip-table{table}")
    text = module.render(module.run())["md"]
    assert all(f"| {row['method']} |" in text for row in paper()[f"table{table}"])
