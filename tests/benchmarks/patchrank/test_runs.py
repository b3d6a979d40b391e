"""Patch Ranking's runs as command lines, their evaluation, and the table and figure made from their results."""

import json

import pytest
import torch

from benchmarks.cells import paired_interval
from benchmarks.patchrank import evaluate as patchrank_evaluate
from benchmarks.patchrank import runs as patchrank_runs
from benchmarks.patchrank import table1 as patchrank_table1
from benchmarks.patchrank.evaluate import evaluate_avit, evaluate_baselines, evaluate_predictor, evaluate_prompts
from benchmarks.patchrank.rows import BASELINES, ROWS
from benchmarks.patchrank.runs import KINDS, items, results
from benchmarks.patchrank.tasks import FASHION, KEEPS, PRUNE_LAYER, STYLES, TASKS, Task, answers, restored, stored
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from benchmarks.training.run import options
from common.cli import main as lightning
from common.clip import CLIP, load_architecture
from common.data import catalogue
from common.evaluate.accuracy import paired_difference
from common.testing import tiny_architecture
from common.tokenizer import encode
from common.zeroshot import embed_prompts, fill
from patchrank.avit import AViTTower
from patchrank.predictor import RankPredictor, load_predictor
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Prompts
from patchrank.tower import PatchRankTower

ONE_OF_EACH = [item.run for item in items(1, (FASHION,))]


@pytest.mark.parametrize("run", ONE_OF_EACH, ids=lambda run: run.name)
def test_every_run_is_a_command_that_lightning_accepts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning(["fit", *run.arguments(), *options(run.places), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_prompts_of_a_task_leave_room_for_learned_ones(task):
    entry = None if task.drawn else catalogue.entry(task.data)
    texts = [fill(entry.templates[0], name) for name in entry.rename.values()] if entry else task.module.class_prompts
    longest = max(len(encode(text)) for text in texts)
    assert longest + 2 <= load_architecture(task.architecture)["text_cfg"]["context_length"]


def test_all_runs_together_keep_to_the_budget():
    every = [item.run for seed in patchrank_runs.SEEDS for item in items(seed)]
    assert len({run.name for run in every}) == len(every) == 3 * (2 + 4 * 6)
    assert max(run.minutes for run in every) <= 2 and sum(run.minutes for run in every) <= 150


def test_a_tuning_reads_its_seeds_predictor_and_its_record_says_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    every = {item.run.name: item.run for item in items(2, STYLES[:1])}
    tuning = every["patchrank/sketch-coupled-0.6-seed2"]
    weights = "retrain/patchrank/sketch-predictor-seed2/weights.safetensors"
    assert tuning.places == {"model": {"predictor": str(tmp_path / weights)}}
    assert f"runs/{weights}" in tuning.arguments() and str(tmp_path) not in " ".join(tuning.arguments())
    assert list(every).index("patchrank/sketch-predictor-seed2") < list(every).index(tuning.name)
    assert every["patchrank/sketch-text-1.0-seed2"].places == {}


def test_listing_trains_nothing_and_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.delenv("EFFCLIP_DATA", raising=False)
    folder = tmp_path / "retrain/patchrank/blur-avit-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    monkeypatch.setattr("benchmarks.training.run.train", lambda *_, **__: pytest.fail("it trained"))
    assert patchrank_runs.main(["--list", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Fashion-MNIST: not run" in printed and printed.count("about 1 min") == 2 + 3 * 6 - 1
    assert printed.count("about 2 min") == 3 and printed.count("finished") == 1
    listed = [line.split() for line in printed.splitlines() if line.startswith("patchrank/")]
    assert {words[1] for words in listed} == {"about", "finished"}  # however long the name before it


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The sketch task seen by the tiny CLIP: three pictures of val and eight of test."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    CLIP.tiny().save(folder / "tiny.safetensors")

    class Tiny(Task):
        def pictures(self, split, count=8):
            return super().pictures(split, 3 if split == "val" else 8)

    made = Tiny("tiny", "embedded-sketch", tiny_architecture(folder), folder / "tiny.safetensors", shots=1)
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
    free = evaluate_baselines(task)["test"]
    assert {"all tokens", "golden", "EViT", "ToMe", "random 2", "class attention 0.9"} <= set(free)
    assert halting["test"]["halting"]["gmacs"] < free["all tokens"]["gmacs"]
    assert free["golden"]["gmacs"] < result["test"]["0.6"]["gmacs"] < prompted["test"]["0.6"]["gmacs"]
    for evaluated in (result, prompted, halting, {"test": free}):
        for entry in json.loads(json.dumps(evaluated))["test"].values():
            fields(entry)


def test_what_is_stored_is_every_answer():
    right = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.7
    assert torch.equal(restored(json.loads(json.dumps(stored(right, 0.1)))), right)


def test_the_paired_interval_is_that_of_one_task_and_shrinks_with_more():
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.rand(4000, generator=draw) < share for share in (0.72, 0.70))
    one = paired_interval([first[None]], [second[None]])
    expected = paired_difference(first, second)
    assert one[0] == pytest.approx(expected[0], abs=1e-9) and one[1:] == pytest.approx(expected[1:], abs=2e-3)
    two = paired_interval([first[None], first[None]], [second[None], second[None]])
    assert two[0] == pytest.approx(one[0]) and two[2] - two[1] == pytest.approx((one[2] - one[1]) / 2**0.5, rel=0.05)
    seeds = paired_interval([torch.stack([first, second])], [second[None]])  # half of the seeds gain nothing
    assert seeds[0] == pytest.approx(one[0] / 2) and seeds[2] - seeds[1] == pytest.approx(
        (one[2] - one[1]) / 2, rel=0.05
    )


def known_results(tasks=STYLES, seeds=(0, 1, 2)):
    """Results as the runs write them; rows differ in accuracy."""
    draw, levels, made = torch.Generator().manual_seed(0), {name: 0.5 + 0.02 * n for n, name in enumerate(ROWS)}, {}
    for task in tasks:
        for name, source in ROWS.items():
            for file in source.files(task):
                if not file.endswith(tuple(f"seed{seed}" for seed in seeds)) and "seed" in file:
                    continue
                for entry in source.entries:
                    right = torch.rand(2000, generator=draw) < levels[name]
                    result = made.setdefault(file, {"test": {}, "conditions": {}})
                    result["test"][entry.format(task=task.name.lower())] = stored(right, 0.02)
        for seed in seeds:
            for kind, share in zip(KINDS, (0.9, 0.8), strict=True):
                made[f"{task.name.lower()}-{kind}-1.0-seed{seed}"]["val"] = {"1.0": {"accuracy": share}}
    return made


@pytest.fixture
def with_results(monkeypatch):
    """Gives table and figure these results."""

    def give(known):
        for name in ("table1", "fig1"):
            monkeypatch.setattr(f"benchmarks.patchrank.{name}.results", lambda: known)

    monkeypatch.setattr(patchrank_table1, "times", lambda rounds: [{"1": 0.001, "32": 0.03}] * len(ROWS))
    return give


def rendered(name):
    module = benchmark(name).load()
    return module.render(json.loads(json.dumps(module.run(smoke=True))))


def test_the_table_states_leads_headline_and_the_oracle_apart(with_results):
    with_results(known_results())
    text = rendered("patchrank-table1")["md"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    ours = next(line for line in lines if line.startswith("| Patch Ranking |"))
    assert " ± " in ours and "| 65.4 |" in ours, "the paper's mean of its row"
    assert lines[len(ROWS) + 1].startswith("| *oracle:* golden ranking |")
    evit = next(line for line in lines if line.startswith("| EViT |"))
    assert evit.count("[") == 2 and "| not run |" in evit  # Fashion-MNIST
    # Text prompts were the better ones on val: their row, 0.02 per row, stands 3 rows above the pruned model.
    assert "**Headline**: at keep 0.6, Patch Ranking + V+T prompts" in text
    gap = 2 * (list(ROWS).index("Patch Ranking + V+T prompts") - list(ROWS).index("all tokens + T prompts"))
    mean = text.split("mean of the three styles ")[-1].split(" ")[0]
    assert float(mean) == pytest.approx(gap, abs=1.5)
    assert "Caltech101" in text and "cannot be the pruned image tower" in text
    assert set(rendered("patchrank-table1")["figures"]) == {"patchrank-table1"}


def test_table_and_figure_render_before_anything_is_run_and_with_fewer_seeds(with_results):
    with_results({})
    table, figure = rendered("patchrank-table1"), rendered("patchrank-fig1")
    assert "Headline: not run (`python -m benchmarks patchrank-runs`)" in table["md"] and "Not run:" in figure["md"]
    assert all(f"| {name} | not run |" in table["md"] for name in BASELINES)
    with_results(known_results(TASKS, seeds=(0,)))
    table, figure = rendered("patchrank-table1"), rendered("patchrank-fig1")
    assert "of all 4 tasks" in table["md"] and "over 1 training seeds" in table["md"].replace("up to ", "over ", 1)
    assert "| Fashion-MNIST | Patch Ranking + V+T prompts |" in figure["md"]
    tasks = ", ".join(task.name for task in TASKS)  # the made-up results cost the same
    assert f"| {tasks} | class attention | 0.0200, 0.0 % |" in figure["md"]


def test_the_papers_rows_are_rows_of_the_table():
    printed = paper_numbers("patchrank")
    assert {row["row"] for row in printed["table1"]} <= set(ROWS)
    assert all(len(row["accuracy"]) == len(printed["sets"]) for row in printed["table1"])


def test_recipes_start_with_the_stored_losses(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    for name, kind in (("sketch-predictor-seed0", "predictor"), ("sketch-coupled-0.6-seed0", "prompts")):
        if name in results():  # none before the first real run
            expected = results()[name]["first_losses"]
            assert patchrank_evaluate.recipe_losses(kind) == pytest.approx(expected, rel=0.02)


def test_committed_weights_give_the_stored_answers():
    known, committed = results(), patchrank_evaluate.COMMITTED
    for task in STYLES:
        made = (committed / f"{task.name}_prompts.safetensors").is_file()  # not before the first real run
        for name, right in committed_answers(task, 500).items() if made else ():
            expected = restored(known[name]["test"]["0.6"])[:500]
            assert abs(int(right.sum()) - int(expected.sum())) <= 1, name


def committed_answers(task, count):
    """Right answers of the committed predictor on the first pictures of test, at keep 0.6.

    Without tuning and with the committed prompts, by the names of the runs that trained them.
    """
    folder, clip, name = patchrank_evaluate.COMMITTED, task.clip(), task.name.lower()
    predictor = load_predictor(folder / f"{name}.safetensors", clip.image_tower, PRUNE_LAYER).eval()
    pictures, size = task.pictures("test", count), clip.image_tower.image_size
    right = {}
    tuned = Prompts.load(folder / f"{name}_prompts.safetensors")
    untuned = ("predictor", None, task.module.class_prompts)
    for run, prompts, texts in (untuned, ("coupled-0.6", tuned, task.tuned_prompts)):
        model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, predictor, 0.6, PRUNE_LAYER, prompts))
        encoders = {f"{name}-{run}-seed0": patchrank_evaluate.plain(model.tower)}
        right |= answers(encoders, pictures, size, embed_prompts(model, texts))
    return right
