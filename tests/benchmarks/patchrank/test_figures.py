"""Figures 3, 4 and 5 of Patch Ranking, measured at their smallest and rendered from the stored form."""

import json
import math

import pytest
import torch

from benchmarks.patchrank import fig4 as patchrank_fig4
from benchmarks.patchrank import fig5 as patchrank_fig5
from benchmarks.patchrank.tasks import SHAPES
from benchmarks.registry import benchmark
from patchrank.predictor import RankPredictor, save_predictor


@pytest.fixture
def predictors(monkeypatch, tmp_path):
    """Writes untrained predictors where the committed ones are looked for; rankings go to the test's folder."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setattr(patchrank_fig4, "COMMITTED", tmp_path)
    monkeypatch.setattr(patchrank_fig5, "COMMITTED", tmp_path)

    def give():
        torch.manual_seed(0)
        tower = SHAPES.clip().image_tower
        for seed in range(2):
            save_predictor(RankPredictor.for_tower(tower), tmp_path / f"first-seed{seed}.safetensors", 0)
        save_predictor(RankPredictor.for_tower(tower), tmp_path / "shapes.safetensors", 1)

    return give


def made(name):
    """The result of a smoke run as it is stored, and what is rendered from it."""
    result = json.loads(json.dumps(benchmark(name).load().run(smoke=True)))
    assert not any(isinstance(value, float) and math.isnan(value) for value in result.values())
    return result, benchmark(name).load().render(result)


def test_figure_3_shows_three_scores_of_the_same_pictures(predictors):
    result, rendered = made("patchrank-fig3")
    assert {len(scores) for by_picture in result["scores"].values() for scores in by_picture} == {36}
    assert result["agreement"]["feature"] == {"tau": pytest.approx(1), "overlap": 1}
    (axes,) = {len(figure.axes) for figure in rendered["figures"].values()}
    assert axes == 4 * len(result["shown"]) == 24 and "| label-driven |" in rendered["md"]


def test_figure_4_shows_what_each_method_keeps(predictors):
    result, rendered = made("patchrank-fig4")
    assert "| predictor | not run: `python -m benchmarks patchrank-runs` | |" in rendered["md"]
    predictors()
    result, rendered = made("patchrank-fig4")
    assert {len(set(kept)) for by_picture in result["kept"].values() for kept in by_picture} == {18}
    assert result["shared"]["golden ranking"] == 1 and len(rendered["figures"]["patchrank-fig4"].axes) == 4 * 6
    assert all(0 < lost < 2 for lost in result["lost"].values())


def test_figure_5_has_a_row_for_every_method_and_rate(predictors):
    result, rendered = made("patchrank-fig5")
    methods = [row["method"] for row in result["rows"]]
    free = ["class attention", "DivPrune", "k-medoids", "random places"]
    assert methods == ["all tokens", *free, "golden ranking (oracle)"]
    assert "The predictor: not run" in rendered["md"]
    predictors()
    result, rendered = made("patchrank-fig5")
    rows = {row["method"]: row for row in result["rows"]}
    assert len(rows["predictor"]["accuracy"]) == 2 and rows["class attention"]["lead"] is None
    assert rows["predictor"]["gmacs"] < rows["all tokens"]["gmacs"] and len(rows["predictor"]["lead"]) == 3
    assert rows["golden ranking (oracle)"]["gmacs"] < rows["class attention"]["gmacs"] < rows["predictor"]["gmacs"]
    assert "| predictor | 50% |" in rendered["md"] and "patchrank-fig5" in rendered["figures"]
