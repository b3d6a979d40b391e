"""The frontier on a tiny CLIP and noise: what is observed, what it costs, and what a whole run says."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from benchmarks.mlip import shapes_runs
from benchmarks.mlip.shapes_runs import CLIP as CLIP_ROW
from benchmarks.mlip.shapes_runs import MLIP_ROW
from benchmarks.together import compositions, frontier
from benchmarks.together.compositions import (
    DENSE,
    FEW,
    FINE_KEEPS,
    RANKED,
    SEEDED,
    TRAINED,
    Family,
    compose,
    families,
    fitted_to,
    training_free,
)
from benchmarks.together.frontier import (
    best_reducers,
    cascade,
    class_texts,
    classifier,
    costs_of,
    observe,
    path_gmacs,
    render,
    seconds_per_image,
)
from benchmarks.together.operating_points import Setting
from benchmarks.training import shapes
from benchmarks.waveclip import answers
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.controls import CASCADE, HALF, LATER_WAVE, TRAINED_ON, WAVE
from common.clip import CLIP
from common.flops import count_macs
from common.reducer_registry import named
from common.testing import TINY_CAPTIONS
from mlip.model import MLIP
from patchrank.predictor import RankPredictor, save_predictor
from patchrank.tower import PatchRankTower
from waveclip import MarginGate, ProgressiveClassifier, WaveTower

PROMPTS = list(TINY_CAPTIONS)
COMMITTED, FAMILIES = dict(TRAINED), shapes.FAMILIES
SOME = (0.8, 1.0)
"""Budgets of most tests: the search for keep rates counts many models."""


@pytest.fixture(scope="module", autouse=True)
def untrained(tmp_path_factory):
    """No weights of trained methods; gives the folder where they would be."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        for name, (path, command) in TRAINED.items():
            patch.setitem(TRAINED, name, (folder / path.name, command))
        patch.setenv("EFFCLIP_RUNS", str(folder / "runs"))
        patch.setattr(shapes, "FAMILIES", [(name, [replace(r, output=None) for r in runs]) for name, runs in FAMILIES])
        yield folder


@pytest.fixture(scope="module")
def tiny():
    """The tiny CLIP with 4 blocks, and a WaveCLIP of it."""
    torch.manual_seed(0)
    clip = CLIP(four_blocks()).eval()
    return clip, WaveTower.from_image_tower(clip.image_tower).eval()


def four_blocks(image_size=32):
    architecture = CLIP.tiny().architecture
    return {**architecture, "vision_cfg": {**architecture["vision_cfg"], "layers": 4, "image_size": image_size}}


@pytest.fixture(scope="module")
def methods(tiny):
    clip, wave = tiny
    return [*families({0: clip}, {0: (wave, clip)}, FEW, SOME), *compose(FEW, {0: (wave, clip)})]


@contextmanager
def finished():
    """Weights where trainings leave them: a teacher trained on of two seeds, and a half-resolution CLIP of one."""
    torch.manual_seed(1)
    trained = {(TRAINED_ON, 0): 32, (TRAINED_ON, 1): 32, (HALF, 1): 16}
    paths = [dict(shapes.FAMILIES)[SEEDED[name]][seed].weights for name, seed in trained]
    for path, size in zip(paths, trained.values(), strict=True):
        path.parent.mkdir(parents=True)
        CLIP(four_blocks(size)).save(path)
    yield
    for path in paths:
        path.unlink(), path.parent.rmdir()


@pytest.fixture(scope="module")
def controlled(tiny, untrained):
    """All methods with a WaveCLIP of two seeds and what is ``finished``."""
    clip, wave = tiny
    students = {0: (wave, clip), 1: (WaveTower.from_image_tower(clip.image_tower).eval(), clip)}
    with finished():
        return families({0: clip}, students, FEW, SOME)


@pytest.fixture
def on_disk(untrained):
    with finished():
        yield


def noise(split="val", pictures=16):
    random = {"generator": torch.Generator().manual_seed(len(split))}
    drawn = ((torch.randn(8, 3, 32, 32, **random), torch.randint(6, (8,), **random)) for _ in range(pictures // 8))
    return [{"image": images, "label": labels} for images, labels in drawn]


def test_every_method_stands_alone_and_training_free_ones_in_the_fine_level(methods):
    titles = [named(name).title for name in FEW]
    alone = [DENSE, *(f"teacher + {title}" for title in titles), WAVE]
    assert [method.name for method in methods if not method.composed] == alone
    assert [method.name for method in methods if method.composed] == [f"{WAVE} + {title}" for title in titles]
    assert all(list(method.models) == list(FINE_KEEPS) for method in methods if method.composed)


def half(cost, limit):
    """In place of a search, which counts many models of each reducer."""
    if cost(0.5) > limit:
        raise ValueError("half of the tokens cost more")
    return 0.5


@torch.no_grad()
def test_every_reducer_that_needs_no_training_stands_on_the_frontier(monkeypatch):
    monkeypatch.setattr(compositions, "greatest_keep", half)
    clip = CLIP(four_blocks(48)).eval()
    wave = WaveTower.from_image_tower(clip.image_tower).eval()
    names = training_free()
    assert {"divprune", "atc", "diffrate", "gtp", "zoo-prune"} <= set(names)
    assert not {"crossget", "dynamicvit", "recoverable-compression"} & set(names)
    alone = [method for method in families({0: clip}, {0: (wave, clip)}, names, SOME) if method.reducer]
    joined = compose(names, {0: (wave, clip)})
    assert [method.reducer for method in alone] == [name for name in names if name != "zoo-prune-released"], "too dear"
    assert {method.reducer for method in joined} == {name for name in names if "levels" not in named(name).exceptions}
    pictures = torch.randn(2, 3, 48, 48)
    for method in (*alone, *joined):
        assert method.models[min(method.models)][0].encode_image(pictures).isfinite().all(), method.name


class Costing(torch.nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep


def test_a_reducer_stands_at_its_greatest_keep_rate_within_each_budget_that_it_can_meet(monkeypatch):
    """A picture costs 1 GMAC and the keep rate in percent; no token is left below .05."""

    def cost(model):
        if model.keep < 0.05:
            raise ValueError("too few tokens")
        return 1 + 100 * model.keep

    monkeypatch.setattr(compositions, "_gmacs", cost)
    assert list(fitted_to([Costing], [3.0, 41.0, 80.5])) == [0.4, 0.79]
    assert list(fitted_to([Costing], [3.0, 41.0, 80.5], rate=lambda keep: 0.25)) == [0.25]


@torch.no_grad()
def test_reducers_of_a_real_tower_cost_as_much_as_the_budgets_let_them(methods):
    by_name = {method.name: method for method in methods}
    (dense,) = path_gmacs(by_name[DENSE].models[None][0], 32)
    limits = [share * dense for share in SOME if share < 1]
    for method in (method for method in methods if method.reducer and not method.composed):
        costs = sorted(path_gmacs(model, 32)[0] for (model,) in method.models.values())
        assert costs and all(any(cost <= limit for limit in limits) for cost in costs), method.name
        assert max(costs) > limits[-1] - 0.2 * dense, "a patch of the tiny tower is a fifth of its cost at most"


def test_the_reducers_that_are_best_within_a_budget_are_composed_and_random_beside_them():
    methods = [Family(f"teacher + {name}", {0.5: ()}, (), reducer=name) for name in ("random", "tome", "evit", "atc")]
    accuracies = {"random": (0.4, 1.0), "tome": (0.6, 2.0), "evit": (0.5, 1.0), "atc": (0.55, 2.0)}
    known = {
        f"teacher + {name}": [Setting(f"teacher + {name}", 0.5, None, *found)] for name, found in accuracies.items()
    }
    assert best_reducers(methods, known, [1.0, 2.0, 3.0]) == ["random", "tome", "evit"]
    assert best_reducers(methods, known, [0.5]) == ["random"]


def test_a_composition_pays_for_the_whole_coarse_level_and_less_for_the_fine_one(methods):
    by_name = {method.name: method for method in methods}
    coarse, fine = path_gmacs(by_name[WAVE].models[None][0], 32)
    (dense,) = path_gmacs(by_name[DENSE].models[None][0], 32)
    assert dense == count_macs(by_name[DENSE].clips[0].image_tower, torch.zeros(1, 3, 32, 32)).gmacs
    for method in (method for method in methods if method.name.endswith((" + class attention", " + EViT", " + ToMe"))):
        least, most = (path_gmacs(method.models[keep][0], 32) for keep in (min(method.models), max(method.models)))
        if method.composed:
            assert least[0] == most[0] == coarse < least[1] < most[1] < fine
        else:
            assert most[-1] < dense


def test_what_is_observed_is_what_the_real_classifier_answers(methods):
    texts = class_texts(methods, PROMPTS)
    observed = observe(methods, noise(), PROMPTS, "val")
    assert set(observed) == {(method.name, keep) for method in methods for keep in method.models}
    method = methods[-1]
    (model,), (answers,) = method.models[0.5], observed[method.name, 0.5]
    threshold = float(np.sort(answers.confidence)[7:9].mean())
    classify = ProgressiveClassifier(model, *texts[method.clips[0]], MarginGate(threshold)).eval()
    predictions = [(classify(batch["image"]), batch["label"]) for batch in noise()]
    right = torch.cat([prediction.scores.argmax(-1) == labels for prediction, labels in predictions])
    late = answers.confidence < threshold
    assert right.tolist() == np.where(late, answers.second, answers.first).tolist()
    assert torch.cat([prediction.exit_step for prediction, _ in predictions]).tolist() == late.tolist()


def test_a_waveclip_without_weights_is_read_from_the_answers_that_its_training_left(methods, tmp_path):
    (wave,) = (method for method in methods if method.name == WAVE)
    right = np.random.default_rng(0).random((2, 40)) < 0.5
    confidence = np.random.default_rng(1).random((1, 40), np.float32)
    answers.write(tmp_path / "1.npz", {"val": Answers(right, confidence, confidence)})
    both = replace(wave, left={1: tmp_path / "1.npz"})
    _, stored = observe([methods[0], both], noise(), PROMPTS, "val")[WAVE, None]
    assert stored.first.tolist() == right[0, :16].tolist() and stored.second.tolist() == right[1, :16].tolist()
    assert both.all_seeds == (0, 1) and both.seeds == (0,)


def test_chosen_models_alone_are_observed(methods):
    chosen = {(DENSE, None), (WAVE, None)}
    assert set(observe(methods, noise(), PROMPTS, "val", chosen)) == chosen


def test_a_cascade_has_the_seeds_and_answers_of_its_parts_and_pays_for_both(controlled):
    by_name = {method.name: method for method in controlled}
    assert [by_name[name].seeds for name in (TRAINED_ON, HALF, CASCADE, WAVE)] == [(0, 1), (1,), (1,), (0, 1)]
    whole_models = [by_name[name] for name in (DENSE, TRAINED_ON, HALF, CASCADE)]
    observed, costs = observe(whole_models, noise(), PROMPTS, "val"), costs_of(whole_models, 32)
    (exits,) = observed[CASCADE, None]
    assert exits.first.tolist() == observed[HALF, None][0].tolist()
    assert exits.second.tolist() == observed[TRAINED_ON, None][1].tolist()
    (half,), (whole,) = costs[HALF, None], costs[TRAINED_ON, None]
    assert costs[CASCADE, None] == [half, half + whole] and half < whole == costs[DENSE, None][0]


def test_a_cascade_asks_its_second_model_for_the_unsure_pictures_alone():
    sure, unsure, asked = [0.9, 0.1], [0.5, 0.5], []

    def second(images):
        asked.append(images)
        return torch.tensor([[0.2, 0.8]]).expand(len(images), 2)

    images = torch.arange(3.0)
    scores = cascade(images, lambda images: torch.tensor([sure, unsure, sure]), second, MarginGate(0.4))
    assert scores.tolist() == torch.tensor([sure, [0.2, 0.8], sure]).tolist()
    assert [rows.tolist() for rows in asked] == [[1.0]]


def test_a_half_resolution_clip_sees_the_means_of_2_x_2_pixels(controlled):
    method = next(method for method in controlled if method.name == HALF)
    images = torch.randn(2, 3, 32, 32)
    small = images.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    with torch.no_grad():
        expected = method.clips[0].encode_image(small)
        torch.testing.assert_close(method.models[None][0].encode_image(images), expected)


def test_a_half_resolution_clip_of_photographs_sees_what_its_training_read(controlled):
    clip = next(method for method in controlled if method.name == HALF).clips[0]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    full, small = (to_tensor(image)[None] for image in (picture, picture.resize((16, 16), Image.Resampling.BICUBIC)))
    with torch.no_grad():
        seen = compositions.HalfResolution(clip, "bicubic").encode_image(full)
        torch.testing.assert_close(seen, clip.encode_image(small), atol=5e-3, rtol=0)  # the file has whole grey values


def test_missing_weights_and_seeds_are_named_with_the_command_that_trains_them(on_disk):
    lacking = {name: command for name, command in compositions.missing().items() if name not in TRAINED}
    assert lacking == {
        DENSE: "make retrain ONLY='shapes-teacher-*'",
        WAVE: "make retrain ONLY='shapes-waveclip-*'",
        f"{TRAINED_ON}, 1 of 3 training seeds": "make retrain ONLY='shapes-longer-*'",
        f"{HALF}, 2 of 3 training seeds": "make retrain ONLY='shapes-half-*'",
        LATER_WAVE: "make retrain ONLY='shapes-waveclip-longer-*'",
    }


def test_a_student_of_the_teacher_trained_on_is_read_with_that_teachers_texts(
    controlled, on_disk, tmp_path, monkeypatch
):
    teacher = next(method for method in controlled if method.name == TRAINED_ON).clips[0]
    student, weights_of = tmp_path / "student.safetensors", compositions.weights_of
    WaveTower.from_image_tower(teacher.image_tower).save(student, teacher.architecture)
    monkeypatch.setattr(
        compositions, "weights_of", lambda name: {1: student} if name == LATER_WAVE else weights_of(name)
    )
    family = next(method for method in compositions.embedded_controls() if method.name == LATER_WAVE)
    assert family.seeds == (1,)
    texts = family.clips[0].state_dict()
    assert all(torch.equal(value, texts[name]) for name, value in teacher.state_dict().items())


def test_a_cascade_lacks_what_its_parts_lack(methods):
    commands = compositions.missing()
    assert commands[CASCADE] == f"{commands[HALF]} && {commands[TRAINED_ON]}"


def test_a_whole_run_and_what_it_says(tiny, monkeypatch):
    monkeypatch.setattr(frontier, "models", lambda: tiny)
    monkeypatch.setattr(frontier, "batches", lambda split, pictures: iter(noise(split)))
    monkeypatch.setattr(frontier, "prompts", lambda: PROMPTS)
    result = json.loads(json.dumps(frontier.run(smoke=True)))
    rows = result["rows"]
    assert rows[0]["method"] == DENSE and all(row["seconds"] > 0 for row in rows)
    assert all(row["rival"] is None for row in rows if not row["composed"] and row["method"] != WAVE)
    assert all(row["rival"] and row["share"] >= 0.01 for row in rows if row["composed"])
    assert any(row["best"] for row in rows) and all(row["keep"] and not row["composed"] for row in rows if row["best"])
    budgets = [share * rows[0]["gmacs"] for share in result["budgets"]]
    assert all(row["val"]["gmacs"] <= max(budgets) * (1 + 1e-6) for row in rows[1:])
    rendered = render(result)
    table = [line for line in rendered["md"].splitlines() if line.startswith("|")]
    assert len(table) == 2 * 2 + len(rows) and len({line.count("|") for line in table}) == 1
    (hidden,) = re.findall("<details>(.*)</details>", rendered["md"], re.DOTALL)
    named_rows = {row["method"] for row in rows if row["named"]}
    assert all((f"| {row['method']} |" in hidden) != (row["method"] in named_rows) for row in rows)
    assert {row["method"].removeprefix(f"{WAVE} + ") for row in rows if row["composed"]} >= {named("random").title}
    assert f"| {DENSE} | one seed | – | – | {rows[0]['gmacs']:.4f} | 100 % |" in rendered["md"]
    assert all(f"{name}: not run; `{command}`" in rendered["md"] for name, (_, command) in TRAINED.items())
    assert [axes.get_xlabel() for axes in rendered["figures"]["frontier"].axes] == [
        "million multiply-adds a picture",
        "ms a picture, measured",
    ]


def test_what_the_figure_cuts_off_is_named_at_its_edge():
    row = dict.fromkeys(("keep", "refined", "rival")) | {"composed": False, "seeds": 1}
    row |= {"interval": [0, 1], "dominated": []}
    numbers = {DENSE: (0.03, 0.62), "MLIP": (0.02, 0.41), WAVE: (0.01, 0.6)}
    rows = [row | {"method": m, "gmacs": g, "seconds": g / 10, "accuracy": a} for m, (g, a) in numbers.items()]
    stated = dict.fromkeys(("names", "test_reads", "batch", "rounds", "dtype", "device", "threads", "torch"), 1)
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
        by_name = {method.name: method for method in families({0: clip}, {0: (wave, clip)}, (), SOME)}
    finally:
        paths[RANKED].unlink(), paths["MLIP"].unlink()
    assert by_name.keys() & TRAINED.keys() == {RANKED, "MLIP"}
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for keep, (model,) in by_name[RANKED].models.items():
            expected = PatchRankTower(clip.image_tower, predictor, keep, prune_layer=1)
            torch.testing.assert_close(model(pictures), expected(pictures))
        found = by_name["MLIP"].models[None][0].encode_image(pictures)
        torch.testing.assert_close(found, mlip.encode_image(pictures))
    assert len(by_name[RANKED].models) == 1


def test_mlips_rows_are_those_of_its_experiment_on_the_same_scenes():
    """Each command trains the run whose weights go to the row's file."""
    seed0 = {run.output: run.target for run in shapes_runs.rows({CLIP_ROW: {}, MLIP_ROW: {}}) if run.output}
    rows = [COMMITTED[name] for name in TRAINED if name != RANKED]
    assert len(rows) == 2 and all(seed0[path] == command for path, command in rows)


def test_time_is_that_of_each_row(controlled):
    texts = class_texts(controlled, PROMPTS)
    rows = [{"method": method.name, "keep": next(iter(method.models)), "thresholds": [0.5]} for method in controlled]
    taken = seconds_per_image(rows, controlled, torch.randn(4, 3, 32, 32), texts, 1)
    assert len(taken) == len(rows) and min(taken) > 0


def test_a_timed_cascade_answers_by_the_margin_of_its_half_resolution_clip(controlled):
    texts = class_texts(controlled, PROMPTS)
    by_name = {method.name: method for method in controlled}
    images = torch.randn(3, 3, 32, 32)
    never, always = (classifier(by_name[CASCADE], None, threshold, texts)(images) for threshold in (0.0, 2.0))
    for scores, name in ((never, HALF), (always, TRAINED_ON)):
        torch.testing.assert_close(scores, classifier(by_name[name], None, None, texts)(images))
