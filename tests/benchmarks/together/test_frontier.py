"""The frontier on a tiny CLIP and noise: what is chosen, what it costs, what dominates, and what is said."""

import json
from itertools import product

import pytest
import torch

from benchmarks.mlip import shapes_runs
from benchmarks.mlip.shapes_runs import CLIP as CLIP_ROW
from benchmarks.mlip.shapes_runs import MLIP_ROW
from benchmarks.together import frontier
from benchmarks.together.compositions import DENSE, FINE_KEEPS, KEEPS, RANKED, TRAINED, WAVE, Family, families, reducers
from benchmarks.together.frontier import (
    best_within,
    class_texts,
    mark_dominated,
    observe_all,
    operating_points,
    path_gmacs,
    render,
    seconds_per_image,
    set_against_rivals,
    table_row,
    verdicts,
)
from benchmarks.waveclip.observed import Observed
from common.clip import CLIP
from common.flops import count_macs
from common.testing import TINY_CAPTIONS
from mlip.model import MLIP
from patchrank.predictor import RankPredictor, save_predictor
from patchrank.tower import PatchRankTower
from waveclip import MarginGate, ProgressiveClassifier, WaveTower

PROMPTS = list(TINY_CAPTIONS)
COMMITTED = dict(TRAINED)


@pytest.fixture(scope="module", autouse=True)
def untrained(tmp_path_factory):
    """No weights of trained methods; gives the folder where they would be."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        for name, (path, command) in TRAINED.items():
            patch.setitem(TRAINED, name, (folder / path.name, command))
        yield folder


@pytest.fixture(scope="module")
def tiny():
    """The tiny CLIP with 4 blocks, and a WaveCLIP of it."""
    torch.manual_seed(0)
    architecture = CLIP.tiny().architecture
    clip = CLIP({**architecture, "vision_cfg": {**architecture["vision_cfg"], "layers": 4}}).eval()
    return clip, WaveTower.from_image_tower(clip.image_tower).eval()


@pytest.fixture(scope="module")
def methods(tiny):
    return families(*tiny)


def noise(split="val", pictures=16, image_size=None):
    generator = torch.Generator().manual_seed(len(split))
    return [
        {
            "image": torch.randn(8, 3, 32, 32, generator=generator),
            "label": torch.randint(6, (8,), generator=generator),
        }
        for _ in range(pictures // 8)
    ]


def test_every_method_stands_alone_and_training_free_ones_in_the_fine_level(methods):
    names = list(reducers(0.5, 16, 4))
    alone = [DENSE, *(f"teacher + {name}" for name in names), WAVE]
    assert [method.name for method in methods if not method.composed] == alone
    assert [method.name for method in methods if method.composed] == [f"{WAVE} + {name}" for name in names]
    assert all(list(method.models) == list(FINE_KEEPS) for method in methods if method.composed)


def test_a_composition_pays_for_the_whole_coarse_level_and_less_for_the_fine_one(methods):
    by_name = {method.name: method for method in methods}
    coarse, fine = path_gmacs(by_name[WAVE].models[None], 32)
    (dense,) = path_gmacs(by_name[DENSE].models[None], 32)
    assert dense == count_macs(by_name[DENSE].clip.image_tower, torch.zeros(1, 3, 32, 32)).gmacs
    for method in (method for method in methods if method.name.endswith((" + class attention", " + EViT", " + ToMe"))):
        least, most = (path_gmacs(method.models[keep], 32) for keep in (min(method.models), max(method.models)))
        assert least[-1] < most[-1] < (fine if method.composed else dense)
        if method.composed:
            assert least[0] == most[0] == coarse < least[1]


def test_what_is_observed_is_what_the_real_classifier_answers(methods):
    texts = class_texts(methods, PROMPTS)
    observed = observe_all(methods, noise(), texts)
    assert set(observed) == {(method.name, keep) for method in methods for keep in method.models}
    method = methods[-1]
    model, answers = method.models[0.5], observed[method.name, 0.5]
    threshold = float(answers.margin[0].sort().values[7:9].mean())
    correct, shares = answers.at(threshold)
    classify = ProgressiveClassifier(model, *texts[method.clip], MarginGate(threshold)).eval()
    predictions = [(classify(batch["image"]), batch["label"]) for batch in noise()]
    right = torch.cat([prediction.scores.argmax(-1) == labels for prediction, labels in predictions])
    assert right.tolist() == correct.tolist()
    steps = torch.cat([prediction.exit_step for prediction, _ in predictions])
    assert float(steps.double().mean()) == shares[1] == 0.5
    chosen = {(DENSE, None), (method.name, 0.5)}
    some = observe_all(methods, noise(), texts, chosen)
    assert set(some) == chosen and torch.equal(some[method.name, 0.5].correct, answers.correct)


def random_answers(generator, steps=2, pictures=50):
    right = torch.rand(steps, pictures, generator=generator) < 0.5
    return Observed(torch.rand(steps - 1, pictures, generator=generator), right, right[0])


def test_the_best_setting_within_a_budget_by_trying_them_all(tiny):
    generator = torch.Generator().manual_seed(0)
    family = Family("a", dict.fromkeys((0.25, 0.5), torch.nn.Identity()), tiny[0])
    observed = {("a", keep): random_answers(generator) for keep in family.models}
    costs = {("a", 0.25): [1.0, 2.0], ("a", 0.5): [1.0, 3.0]}
    for budget in (1.0, 1.5, 2.0, 3.0):
        best = best_within(family, observed, costs, budget)
        tried = []
        for keep, refined in product(family.models, range(51)):
            answers, (coarse, fine) = observed["a", keep], costs["a", keep]
            order = answers.margin[0].argsort()
            right = torch.cat([answers.correct[1][order[:refined]], answers.correct[0][order[refined:]]])
            gmacs = coarse + (fine - coarse) * refined / 50
            if gmacs <= budget + 1e-9:
                tried.append(float(right.double().mean()))
        assert best.accuracy == pytest.approx(max(tried)) and best.gmacs <= budget + 1e-6
    assert best_within(family, observed, costs, 0.5) is None
    points = operating_points(family, observed, costs, [0.5, 1.0, 1.0, 3.0])
    assert [point.gmacs for point in points] == sorted({point.gmacs for point in points})


def test_a_composition_is_compared_with_the_best_method_alone_that_costs_no_more(tiny):
    clip, model = tiny[0], torch.nn.Identity()
    alone, wave = Family("alone", {0.5: model}, clip), Family(WAVE, {None: model}, clip)
    joined = Family("both", {0.5: model}, clip, composed=True)
    right, wrong = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 40, dtype=torch.bool)
    none, margin = torch.zeros(0, 40), torch.linspace(0, 1, 40)[None]
    observed = {
        ("alone", 0.5): Observed(none, right, right[0]),
        (WAVE, None): Observed(margin, torch.cat([wrong, right]), right[0]),
        ("both", 0.5): Observed(margin, torch.cat([wrong, right]), right[0]),
    }
    costs = {("alone", 0.5): [2.5], (WAVE, None): [1.0, 3.0], ("both", 0.5): [1.0, 2.0]}
    point = best_within(joined, observed, costs, 1.5)  # half of them refined
    rows = [table_row(joined, point, observed["both", 0.5], costs)]
    set_against_rivals(rows, [alone, wave, joined], observed, observed, costs)
    assert rows[0]["accuracy"] == rows[0]["refined"] == 0.5 and rows[0]["gmacs"] == 1.5
    assert rows[0]["rival"]["method"] == WAVE  # a quarter refined for the same money; "alone" is too dear
    assert rows[0]["rival"]["difference"][0] == pytest.approx(0.25)
    assert verdicts([rows[0] | {"dominated": []}])[0].startswith("**both pays** in multiply-adds: at 1 of 1 ")
    costs["alone", 0.5] = [1.4]
    set_against_rivals(rows, [alone, wave, joined], observed, observed, costs)
    assert rows[0]["rival"] | {"difference": None} == {"method": "alone", "keep": 0.5, "difference": None}
    said = verdicts([rows[0] | {"dominated": ["seconds"]}])[0]
    assert "does not pay" in said and "at 1 clearly below" in said and "on the frontier at 0 of them" in said


def test_a_row_is_dominated_where_another_is_as_accurate_for_no_more():
    rows = [
        {"gmacs": 1.0, "seconds": 2.0, "accuracy": 0.5},
        {"gmacs": 2.0, "seconds": 1.0, "accuracy": 0.5},
        {"gmacs": 3.0, "seconds": 3.0, "accuracy": 0.6},
        {"gmacs": 3.0, "seconds": 4.0, "accuracy": 0.6},
    ]
    mark_dominated(rows)
    assert [row["dominated"] for row in rows] == [["seconds"], ["gmacs"], [], ["seconds"]]


def test_a_whole_run_and_what_it_says(tiny, monkeypatch):
    monkeypatch.setattr(frontier, "models", lambda: tiny)
    monkeypatch.setattr(frontier, "batches", lambda split, pictures: noise(split))
    monkeypatch.setattr(frontier, "prompts", lambda: PROMPTS)
    result = json.loads(json.dumps(frontier.run(smoke=True)))
    rows = result["rows"]
    assert rows[0]["method"] == DENSE and all(row["seconds"] > 0 for row in rows)
    assert all((row["rival"] is not None) == row["composed"] for row in rows)
    budgets = [share * rows[0]["gmacs"] for share in result["budgets"]]
    assert all(row["val"]["gmacs"] <= max(budgets) * (1 + 1e-6) for row in rows[1:])
    rendered = render(result)
    table = [line for line in rendered["md"].splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert f"| {DENSE} | – | – | {rows[0]['gmacs']:.4f} | 100 % |" in rendered["md"]
    assert all(f"{name}: not run; `{command}`" in rendered["md"] for name, (_, command) in TRAINED.items())
    assert rendered["md"].count("pay** in multiply-adds") + rendered["md"].count("pays** in multiply-adds") == len(
        {row["method"] for row in rows if row["composed"]}
    )
    assert [axes.get_xlabel() for axes in rendered["figures"]["frontier"].axes] == [
        "million multiply-adds a picture",
        "ms a picture, measured",
    ]


def test_what_the_figure_cuts_off_is_named_at_its_edge():
    row = {"composed": False, "keep": None, "refined": None, "interval": [0, 1], "rival": None, "dominated": []}
    numbers = {DENSE: (0.03, 0.62), "MLIP": (0.02, 0.41), WAVE: (0.01, 0.6)}
    rows = [row | {"method": m, "gmacs": g, "seconds": g / 10, "accuracy": a} for m, (g, a) in numbers.items()]
    stated = dict.fromkeys(("batch", "rounds", "dtype", "device", "threads", "torch"), 1)
    result = {"conditions": stated, "pictures": {"val": 1, "test": 1}, "budgets": [1.0], "rows": rows, "missing": {}}
    for axes, x in zip(render(result)["figures"]["frontier"].axes, (20, 2), strict=True):
        (name,) = axes.texts
        assert name.get_text() == "MLIP: 41.0" and name.xy == pytest.approx((x, axes.get_ylim()[0]))


def test_trained_methods_are_there_when_their_weights_are(tiny, untrained):
    clip, wave = tiny
    predictor = RankPredictor.for_tower(clip.image_tower).eval()
    mlip = MLIP(clip.architecture, frequency_layers=1, keep_rates={3: 0.5}).eval()
    paths = {name: path for name, (path, _) in TRAINED.items()}
    save_predictor(predictor, paths[RANKED], 1, torch.float32)
    mlip.save(paths["MLIP"])
    try:
        by_name = {method.name: method for method in families(clip, wave)}
    finally:
        paths[RANKED].unlink(), paths["MLIP"].unlink()
    assert by_name.keys() & TRAINED.keys() == {RANKED, "MLIP"}
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for keep, model in by_name[RANKED].models.items():
            expected = PatchRankTower(clip.image_tower, predictor, keep, prune_layer=1)
            torch.testing.assert_close(model(pictures), expected(pictures))
        found = by_name["MLIP"].models[None].encode_image(pictures)
        torch.testing.assert_close(found, mlip.encode_image(pictures))
    assert list(by_name[RANKED].models) == list(KEEPS)


def test_mlips_rows_are_those_of_its_experiment_on_the_same_scenes():
    """Each command trains the run whose weights go to the row's file."""
    seed0 = {run.output: run.target for run in shapes_runs.rows({CLIP_ROW: {}, MLIP_ROW: {}}) if run.output}
    rows = [COMMITTED[name] for name in TRAINED if name != RANKED]
    assert len(rows) == 2 and all(seed0[path] == command for path, command in rows)


def test_time_is_that_of_each_row(methods):
    texts = class_texts(methods, PROMPTS)
    rows = [{"method": method.name, "keep": next(iter(method.models)), "threshold": 0.0} for method in methods]
    taken = seconds_per_image(rows, methods, torch.randn(4, 3, 32, 32), texts, 1)
    assert len(taken) == len(rows) and min(taken) > 0
