"""Patch Ranking's runs as command lines, their evaluation, and the table and figure made from their results."""

import json

import pytest
import torch

from benchmarks.patchrank import evaluate as patchrank_evaluate
from benchmarks.patchrank import runs as patchrank_runs
from benchmarks.patchrank.comparisons import LEARNED, learned, rivals, verdict
from benchmarks.patchrank.evaluate import (
    FEWER,
    MORE,
    RIVALS,
    around,
    evaluate_avit,
    evaluate_baselines,
    evaluate_predictor,
    evaluate_prompts,
    gmacs,
)
from benchmarks.patchrank.methods import DENSE, OURS, methods, titled, training_free
from benchmarks.patchrank.rows import BASELINES, ROWS
from benchmarks.patchrank.runs import KINDS, items, results
from benchmarks.patchrank.tasks import (
    CIFAR,
    FASHION,
    KEEP,
    KEEPS,
    PRUNE_LAYER,
    SHAPES,
    TASKS,
    Task,
    answers,
    restored,
    stored,
)
from benchmarks.patchrank.trained_rivals import TRAINED_RIVALS, Rival
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from benchmarks.training.run import options
from common.cli import main as lightning
from common.clip import CLIP, load_architecture
from common.data import catalogue
from common.testing import tiny_architecture
from common.tokenizer import encode
from common.zeroshot import embed_prompts, fill
from patchrank.avit import AViTTower
from patchrank.crossget import CrossGETTower
from patchrank.dynamicvit import DynamicViTTower
from patchrank.predictor import RankPredictor, load_predictor
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Prompts
from patchrank.tower import PatchRankTower

ONE_OF_EACH = [item.run for item in items((SHAPES, FASHION), (1,))]


@pytest.mark.parametrize("run", ONE_OF_EACH, ids=lambda run: run.name)
def test_every_run_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), *options(run.places), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_prompts_of_a_task_leave_room_for_learned_ones(task):
    if task.variable is None:
        texts = task.module.class_prompts
    else:
        entry = catalogue.entry(task.data)
        names = entry.rename.values() or ["airplane", "automobile", "bird", "deer", "truck"]  # torchvision has CIFAR's
        texts = [fill(entry.templates[0], name) for name in names]
    longest = max(len(encode(text)) for text in texts)
    assert longest + 2 <= load_architecture(task.architecture)["text_cfg"]["context_length"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_tasks_weights_are_of_its_architecture(task):
    recorded, stated = CLIP.load(task.weights).architecture, load_architecture(task.architecture)
    assert all(recorded[part] == stated[part] for part in ("embed_dim", "vision_cfg", "text_cfg"))


def test_all_runs_together_keep_to_the_budget():
    every = [item.run for item in items()]
    assert len({run.name for run in every}) == len(every) == 3 * (3 * 10 + 1)
    assert max(run.minutes for run in every) <= 60 and sum(run.minutes for run in every) <= 420


def saved_rival(rival, clip, keep, path):
    """A file as the rival's training leaves it."""
    if rival.recipe.endswith("_tuning"):
        clip.save(path)
    else:
        tower = {"crossget": CrossGETTower, "dynamicvit": DynamicViTTower}[rival.recipe]
        tower(clip.image_tower, keep=keep).save(path, clip.architecture)
    return path


@pytest.mark.parametrize("rival", TRAINED_RIVALS.values(), ids=TRAINED_RIVALS)
def test_a_trained_rival_costs_no_more_than_patch_ranking_and_would_at_the_next_rate(rival, tmp_path):
    clip, rate = SHAPES.clip(), rival.rates[SHAPES]
    size = clip.image_tower.image_size
    file = saved_rival(rival, clip, rate, tmp_path / "rival.safetensors")
    budget = gmacs(methods(clip.image_tower, KEEP, PRUNE_LAYER)[OURS], size)
    assert gmacs(rival.load(file, rate), size) <= budget < gmacs(rival.load(file, rate + 0.01), size)


def test_a_tuning_reads_its_seeds_predictor_and_its_record_says_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    every = {item.run.name: item.run for item in items((SHAPES,), (2,))}
    tuning = every["patchrank/shapes-coupled-0.6-seed2"]
    weights = "retrain/patchrank/shapes-predictor-seed2/weights.safetensors"
    assert tuning.places == {"model": {"predictor": str(tmp_path / weights)}}
    assert f"runs/{weights}" in tuning.arguments() and str(tmp_path) not in " ".join(tuning.arguments())
    assert list(every).index("patchrank/shapes-predictor-seed2") < list(every).index(tuning.name)
    assert every["patchrank/shapes-text-1.0-seed2"].places == {}


def test_a_folder_of_pictures_is_read_where_the_variable_says_and_recorded_by_its_name(monkeypatch, tmp_path):
    monkeypatch.delenv("PHOTOS", raising=False)
    assert CIFAR.missing() == "PHOTOS is not set"
    monkeypatch.setenv("PHOTOS", str(tmp_path / "flowers"))
    assert CIFAR.missing() == "PHOTOS names no folder cifar10"
    monkeypatch.setenv("PHOTOS", str(tmp_path / "CIFAR-10"))
    assert CIFAR.missing() is None
    run = next(item.run for item in items((CIFAR,), (0,)))
    assert run.places["data"] == {"name": str(tmp_path / "CIFAR-10")}
    assert "cifar10" in run.arguments() and str(tmp_path) not in " ".join(run.arguments())


def test_a_part_of_the_pictures_shows_every_class():
    """Drawn names come in turn; the classes of a folder follow one another."""
    labels = SHAPES.pictures("test", 504).labels
    assert sorted(labels) == sorted([*range(252)] * 2)
    assert [index // 1000 for index in CIFAR.chosen(10_000, 20)] == sorted([*range(10)] * 2)


def test_listing_trains_nothing_and_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    for name in ("EFFCLIP_DATA", "PHOTOS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "retrain/patchrank/shapes-avit-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    monkeypatch.setattr("benchmarks.training.run.train", lambda *_, **__: pytest.fail("it trained"))
    assert patchrank_runs.main(["--list", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Fashion-MNIST: not run" in printed and "CIFAR-10: not run" in printed
    assert printed.count("about 1 min") == 9 - 1 and printed.count("finished") == 1
    listed = [line.split() for line in printed.splitlines() if line.startswith("patchrank/")]
    assert {words[1] for words in listed} == {"about", "finished"}  # however long the name before it
    assert patchrank_runs.main(["--list", "--only", "shapes-text-*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("patchrank/")]
    assert len(names) == 2 * 3 and all(name.startswith("patchrank/shapes-text-") for name in names)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Scenes of shape seen by the tiny CLIP: three pictures of val and eight of test."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    CLIP.tiny().save(folder / "tiny.safetensors")

    class Tiny(Task):
        def pictures(self, split, count=8):
            return super().pictures(split, 3 if split == "val" else 8)

    made = Tiny("tiny", "embedded-shapes", tiny_architecture(folder), folder / "tiny.safetensors", "tiny", shots=1)
    made.module.training.class_names[:] = [f"{a} {b}" for a in ("red", "green") for b in ("cat", "dog", "bird")]
    return made


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder of rankings and committed files."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(patchrank_evaluate, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(patchrank_evaluate, "_losses", lambda *_: {})
    return tmp_path


def fields(entry):
    assert entry["pictures"] == len(restored(entry)) == 8 and entry["gmacs"] > 0
    assert entry["accuracy"] == restored(entry).float().mean().item()


def test_every_evaluation_gives_each_picture_and_costs(task, folder):
    clip = task.clip()
    predictor = RankPredictor.for_tower(clip.image_tower)
    tower = PatchRankTower(clip.image_tower, predictor, 0.6, 1)
    tower.save(folder / "predictor.safetensors", clip.architecture)
    result = evaluate_predictor(folder / "predictor.safetensors", task, seed=0)
    assert set(result["test"]) == {str(keep) for keep in KEEPS} and 0 <= result["overlap"] <= 1
    assert (folder / "committed/tiny.safetensors").is_file()
    tuned = PatchRankTower(clip.image_tower, predictor, 0.6, 1, Prompts("coupled", 2, 2, 64, 64))
    PromptedCLIP(clip, tuned).save(folder / "prompted.safetensors")
    prompted = evaluate_prompts(folder / "prompted.safetensors", task, "coupled", 0.6, seed=0)
    assert set(prompted["val"]) == {"0.6"} and (folder / "committed/tiny_prompts.safetensors").is_file()
    AViTTower(clip.image_tower, 1.0, 6.0).save(folder / "avit.safetensors", clip.architecture)
    halting = evaluate_avit(folder / "avit.safetensors", task)
    assert 1 <= halting["depth"] < 2
    reduced = {}
    for name, rival in TRAINED_RIVALS.items():
        file = saved_rival(rival, clip, 0.6, folder / "rival.safetensors")
        reduced[name] = Rival(rival.recipe, {task: 0.6}, rival.load).evaluate(file, task)
    baselines = evaluate_baselines(task)
    free = baselines["test"]
    assert {"all tokens", "EViT", "ToMe", "k-medoids", "random 2", "class attention 0.9"} <= set(free)
    assert baselines["oracle"]["searched"]["lost"] <= baselines["oracle"]["greedy"]["lost"]
    budget = result["test"]["0.6"]["gmacs"]
    assert {f"{rival}, {side}" for rival in RIVALS for side in (FEWER, MORE)} <= set(free)
    assert halting["test"]["halting"]["gmacs"] < free["all tokens"]["gmacs"]
    assert baselines["oracle"]["greedy"]["gmacs"] < budget < prompted["test"]["0.6"]["gmacs"]
    for evaluated in (result, prompted, halting, *reduced.values(), {"test": free}):
        for entry in json.loads(json.dumps(evaluated))["test"].values():
            fields(entry)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rivals_neighbours_in_cost_lie_around_the_budget(name):
    tower = CLIP.tiny().image_tower
    size, patches = tower.image_size, tower.grid**2
    most, least = (gmacs(training_free(tower, keep, PRUNE_LAYER)[name], size) for keep in (1.0, 2 / patches))
    budget = (most + least) / 2
    fewer, more = (gmacs(model, size) for model in around(tower, name, budget))
    assert fewer <= budget < more


def test_what_is_stored_is_every_answer():
    right = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.7
    assert torch.equal(restored(json.loads(json.dumps(stored(right, 0.1)))), right)


def known_results(tasks=(SHAPES, CIFAR), seeds=(0, 1, 2)):
    """Results as the runs write them; rows differ in accuracy, and a rival's neighbours in cost by 0.1."""
    draw, levels, made = torch.Generator().manual_seed(0), {name: 0.5 + 0.02 * n for n, name in enumerate(ROWS)}, {}
    for task in tasks:
        for name, source in ROWS.items():
            for file in source.files(task):
                if not file.endswith(tuple(f"seed{seed}" for seed in seeds)) and "seed" in file:
                    continue
                for entry in source.entries:
                    right = torch.rand(2000, generator=draw) < levels[name]
                    result = made.setdefault(file, {"test": {}, "conditions": {}})
                    result["test"][entry] = stored(right, 0.02)
        baselines = made[f"{task.key}-baselines"]
        for name in RIVALS:
            for side, share, cost in ((FEWER, 0.5, 0.019), (MORE, 0.6, 0.021)):
                right = torch.rand(2000, generator=draw) < share
                baselines["test"][f"{name}, {side}"] = stored(right, cost)
        right = torch.rand(100, generator=draw) < 0.5
        baselines["oracle"] = {name: stored(right, 0.02) | {"lost": 0.01} for name in ("greedy", "searched")}
        for seed in seeds:
            for kind, share in zip(KINDS, (0.9, 0.8), strict=True):
                made[f"{task.key}-{kind}-1.0-seed{seed}"]["val"] = {"1.0": {"accuracy": share}}
    return made


@pytest.fixture
def with_results(monkeypatch):
    """Gives table and figure these results."""

    def give(known):
        for name in ("table1", "fig1"):
            monkeypatch.setattr(f"benchmarks.patchrank.{name}.results", lambda: known)

    return give


def rendered(name):
    module = benchmark(name).load()
    return module.render(json.loads(json.dumps(module.run(smoke=True))))


def test_the_table_states_every_row_the_headline_and_what_the_oracle_is(with_results):
    with_results(known_results())
    text = rendered("patchrank-table1")["md"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    ours = next(line for line in lines if line.startswith("| Patch Ranking |"))
    assert " ± " in ours and "| 65.4 |" in ours, "the paper's mean of its row"
    assert [line.split(" | ")[0] for line in lines[2 : len(ROWS) + 2]] == [f"| {titled(name)}" for name in ROWS]
    assert "| GMACs, Fashion-MNIST |" in lines[0] and "| saved, Fashion-MNIST |" in lines[0]
    assert "| not run |" in ours  # Fashion-MNIST
    # Text prompts were the better ones on val: their row, 0.02 per row, stands some rows above the pruned model.
    assert "**Headline**: at keep 0.6, Patch Ranking + V+T prompts" in text
    gap = 2 * (list(ROWS).index("Patch Ranking + V+T prompts") - list(ROWS).index("all tokens + T prompts"))
    mean = text.split("mean of 2 tasks ")[-1].split(" ")[0]
    assert float(mean) == pytest.approx(gap, abs=1.5)
    assert "Caltech101" in text and "cannot be the pruned image tower" in text
    assert "neither line bounds the accuracy" in text and "| golden ranking, searched |" in text


def test_every_row_has_a_mark_of_its_own_beside_a_line_of_the_unpruned_model(with_results):
    with_results(known_results())
    (figure,) = rendered("patchrank-table1")["figures"].values()
    for axes in figure.axes:
        marks = [(line.get_color(), line.get_marker()) for line in axes.lines if line.get_linestyle() == "None"]
        assert len(set(marks)) == len(marks) == len(ROWS)
        assert len(axes.lines) == len(ROWS) + 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(map(titled, ROWS))
    (curves,) = rendered("patchrank-fig1")["figures"].values()
    assert all("unpruned, untuned" in axes.get_legend_handles_labels()[1] for axes in curves.axes)


def test_one_legend_names_what_any_panel_shows_and_a_curve_has_one_look(with_results):
    untuned = tuple(f"{CIFAR.key}-{kind}" for kind in KINDS)
    with_results({name: run for name, run in known_results().items() if not name.startswith(untuned)})
    (table,), (curves,) = (rendered(name)["figures"].values() for name in ("patchrank-table1", "patchrank-fig1"))
    assert {text.get_text() for text in table.legends[0].get_texts()} == set(map(titled, ROWS))
    looks = {}
    for axes in curves.axes:
        for line in axes.containers:
            looks.setdefault(line.get_label(), set()).add(line.lines[0].get_color())
    assert len(looks) > len(curves.axes[-1].containers) and all(len(colours) == 1 for colours in looks.values())


def test_rivals_are_compared_at_equal_keep_and_at_equal_cost(with_results):
    """Of 2,000 pictures, ours names .70 in the 11th row; a rival between .5 and .6 names .55 at the same cost."""
    found = rivals(known_results())
    (row,) = (row for row in found if (row["task"], row["rival"], row["basis"]) == ("shapes", "EViT", "equal GMACs"))
    share = 0.5 + 0.02 * list(ROWS).index("Patch Ranking")
    assert row["lead"][0] == pytest.approx(share - 0.55, abs=0.03)
    assert {row["basis"] for row in found if row["rival"] in ("A-ViT", DENSE)} == {"own cost"}
    assert {row["basis"] for row in found if row["rival"] == "CrossGET"} == {"equal GMACs"}


def test_a_rival_of_one_seed_gets_no_verdict():
    known = {n: run for n, run in known_results().items() if not n.endswith(("dynamicvit-seed1", "dynamicvit-seed2"))}
    rows = [row for row in rivals(known) if row["rival"] == "DynamicViT"]
    assert rows and all(row["seeds"] == 1 and verdict(row) == "one seed" for row in rows)
    assert {row["seeds"] for row in rivals(known) if row["rival"] in ("ToMe", "CrossGET")} == {3}


def test_what_a_trained_reducer_learns_is_measured_against_a_tower_that_was_trained_alike(with_results):
    """A row of the made-up results names 2 points more than the row before it, and CrossGET's control follows it."""
    found = {(row["task"], row["of"], row["rival"]): row for row in learned(known_results())}
    row = found["shapes", "CrossGET", "ToMe, tower trained"]
    assert row["lead"][0] == pytest.approx(-0.02, abs=0.03) and row["seeds"] == 3
    assert found.keys() >= {("shapes", *pair) for pair in LEARNED}
    with_results({})
    assert "What training adds: not run" in rendered("patchrank-table1")["md"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"seeds": 3, "adjusted": 0.01, "lead": [0.02, 0.01, 0.03]}, "better"),
        ({"seeds": 3, "adjusted": 0.01, "lead": [-0.02, -0.03, -0.01]}, "worse"),
        ({"seeds": 3, "adjusted": 0.06, "lead": [0.02, 0.01, 0.03]}, "not shown"),
        ({"seeds": 1, "adjusted": 0.01, "lead": [0.02, 0.01, 0.03]}, "one seed"),
    ],
)
def test_a_difference_needs_several_seeds_and_a_small_adjusted_p(row, said):
    assert verdict(row) == said


def test_table_and_figure_render_before_anything_is_run_and_with_fewer_seeds(with_results):
    with_results({})
    table, figure = rendered("patchrank-table1"), rendered("patchrank-fig1")
    assert "Headline: not run (`python -m benchmarks patchrank-runs`)" in table["md"] and "Not run:" in figure["md"]
    assert all(f"| {titled(name)} | not run |" in table["md"] for name in BASELINES)
    with_results(known_results(TASKS, seeds=(0,)))
    table, figure = rendered("patchrank-table1"), rendered("patchrank-fig1")
    assert "mean of 3 tasks" in table["md"] and "1 training seeds, intervals over" in table["md"]
    assert "| Fashion-MNIST | Patch Ranking + V+T prompts |" in figure["md"]
    tasks = ", ".join(task.name for task in TASKS)  # the made-up results cost the same
    assert f"| {tasks} | class attention | 0.0200, 0.0 % |" in figure["md"]


def test_the_papers_rows_are_rows_of_the_table():
    printed = paper_numbers("patchrank")
    assert {row["row"] for row in printed["table1"]} - {None} <= set(ROWS)
    assert all(len(row["accuracy"]) == len(printed["sets"]) for row in printed["table1"])


def test_recipes_start_with_the_stored_losses(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    for name, kind in (("shapes-predictor-seed0", "predictor"), ("shapes-coupled-0.6-seed0", "prompts")):
        expected = results()[name]["first_losses"]
        assert patchrank_evaluate.recipe_losses(kind) == pytest.approx(expected, rel=0.02)


def test_committed_weights_give_the_stored_answers():
    """The predictor and the prompts on some test pictures of scenes of shape at keep 0.6."""
    known, folder = results(), patchrank_evaluate.COMMITTED
    clip, pictures = SHAPES.clip(), SHAPES.pictures("test")
    chosen = SHAPES.chosen(len(pictures), 200)
    predictor = load_predictor(folder / f"{SHAPES.key}.safetensors", clip.image_tower, PRUNE_LAYER).eval()
    models = {
        "predictor": (None, SHAPES.module.class_prompts),
        "coupled-0.6": (Prompts.load(folder / f"{SHAPES.key}_prompts.safetensors"), SHAPES.tuned_prompts),
    }
    for run, (prompts, texts) in models.items():
        model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, predictor, 0.6, PRUNE_LAYER, prompts))
        encoders = {run: patchrank_evaluate.plain(model.tower)}
        size = clip.image_tower.image_size
        right = answers(encoders, pictures.subset(chosen), size, embed_prompts(model, texts))[run]
        expected = restored(known[f"{SHAPES.key}-{run}-seed0"]["test"]["0.6"])[chosen]
        assert abs(int(right.sum()) - int(expected.sum())) <= 1, run
