"""The benchmark on any folder of pictures, with untrained models in the place of trained ones."""

import json
from functools import partial

import pytest

from benchmarks import read_recipe
from benchmarks.cells import p_value, points
from benchmarks.together import photo_models, photos
from benchmarks.together.frontier import PICTURES
from benchmarks.together.photo_models import (
    CLIP,
    HALF,
    TRAINED_ON,
    WAVE,
    PhotoSet,
    spelling,
    train,
    training_of,
    written_once,
)
from benchmarks.together.photos import RECIPES, render, stand_in
from benchmarks.waveclip import answers, controls
from common.cli import main as lightning
from common.clip import CLIP as Model
from common.tokenizer import Tokenizer
from tests.benchmarks.together.untrained import untrained

NAMES = ["circle", "square", "triangle"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder of pictures, that of runs, and the result of two seeds."""
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "test"):
        stand_in(folder / "Shapes, drawn" / split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFCLIP_RUNS", str(folder / "runs"))
        patch.setenv("PHOTOS", str(folder / "Shapes, drawn"))
        patch.setenv("SEEDS", "2")
        patch.setattr(photo_models, "fit", untrained)
        patch.setitem(PICTURES, "val", 6)
        patch.setitem(PICTURES, "test", 12)
        patch.setattr(photos.frontier, "ROUNDS", 1)
        patch.setattr(photos.frontier, "BUDGETS", (0.6,))
        patch.setattr(photos, "compose", partial(_with_few_settings, photos.compose))
        yield folder, json.loads(json.dumps(photos.run()))


def _with_few_settings(every, *arguments, smoke, **others):
    """``compose`` at one keep rate, as a smoke run has."""
    return every(*arguments, smoke=True, **others)


def test_two_seeds_have_four_models_each(outcome):
    _, result = outcome
    names = [f"photos-shapes-drawn-{model}" for model in (CLIP, WAVE, TRAINED_ON, HALF)]
    assert [run["name"] for run in result["runs"]] == [*names, *(f"{name}-seed1" for name in names)]
    assert result["name"] == "photos-shapes-drawn" and result["conditions"]["classes"] == NAMES
    assert result["pictures"] == {"val": 6, "test": 60}, "a tenth of train validates, the folder test tests"


def test_students_and_the_teacher_trained_on_start_from_their_own_seeds_teacher(outcome):
    runs = outcome[0] / "runs"
    weights = {
        folder.name.removeprefix("photos-shapes-drawn-"): json.loads((folder / "places.json").read_text())["model"]
        for folder in (runs / "retrain").iterdir()
    }
    first = str(runs / "photos/shapes-drawn/weights/photos_shapes_drawn_clip.safetensors")
    second = str(runs / "photos/shapes-drawn/weights/photos_shapes_drawn_clip-seed1.safetensors")
    for model in (WAVE, TRAINED_ON):
        assert weights[model]["weights"] == first and weights[f"{model}-seed1"]["weights"] == second
    assert not any("weights" in weights[model] for model in (CLIP, HALF, f"{HALF}-seed1"))


def test_costs_are_those_of_the_towers(outcome):
    rows = {row["method"]: row for row in outcome[1]["rows"]}
    tokens = [
        rows[name]["tokens"] for name in ("teacher (dense)", "WaveCLIP coarse-only", controls.HALF, "WaveCLIP full")
    ]
    assert tokens == [65, 17, 17, 66]  # 8², 4² and 3 x 4² patches, class tokens
    assert rows[controls.TRAINED_ON]["gmacs"] == rows["teacher (dense)"]["gmacs"] > 3 * rows[controls.HALF]["gmacs"]


def test_the_table_has_all_parts(outcome):
    _, result = outcome
    rendered = render(result)
    text = rendered["md"]
    assert text.startswith("| Shapes, drawn | refined |") and "| WaveCLIP full | 100.0 % |" in text
    assert "2 training seeds: no headline is drawn; SEEDS=3 trains enough." in text
    for row in (
        "| teacher trained on |",
        "| cascade of two CLIPs half |",
        "| chance | 33.3 |",
        "| RGB histogram, MLP |",
    ):
        assert row in text, row
    (control,) = (row for row in result["rows"] if row["method"] == "teacher trained on")
    beside = f"| {points(control['against_teacher'])} | {p_value(control['p'])} | 65.0 |"
    assert beside in text, "a control stands against the teacher too"
    assert "| teacher + class attention |" in text and "| WaveCLIP + random, one draw for all pictures |" in text
    assert "Zero-shot among 3 names by “a photo of a {}.”, on 60 test pictures" in text
    assert "Reads of test by the most often read of these models: 1." in text
    (figure,) = rendered["figures"]
    assert figure == "photos-shapes-drawn"


def test_weights_cards_and_the_log_of_reads_stand_outside_of_the_checkout(outcome):
    folder = outcome[0] / "runs/photos/shapes-drawn"
    models = {CLIP: ["teacher"], WAVE: ["coarse", "fine"], TRAINED_ON: ["teacher"], HALF: ["half-resolution"]}
    for model, levels in models.items():
        for ending, measured in (("", levels), ("-seed1", [])):
            card = (folder / f"weights/photos_shapes_drawn_{model.replace('-', '_')}{ending}.md").read_text()
            assert "(`make reproduce-photos PHOTOS=" in card and "of the folder Shapes, drawn." in card
            assert [line.split()[2] for line in card.splitlines() if line.startswith("| test,")] == measured
    (line,) = map(json.loads, (folder / "results/test-reads.jsonl").read_text().splitlines())
    assert line["table"] == line["data"] == "photos-shapes-drawn" and len(line["models"]) == 8


def test_effclip_evaluate_finds_the_same_accuracies(outcome, monkeypatch, tmp_path):
    folder, result = outcome
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    weights = folder / "runs/photos/shapes-drawn/weights"
    clip, wave = (str(weights / f"photos_shapes_drawn_{model}.safetensors") for model in (CLIP, WAVE))
    data = ["--data", str(folder / "Shapes, drawn"), "--template", "single", "--device", "cpu", "--workers", "0"]
    half = str(weights / "photos_shapes_drawn_clip_half.safetensors")
    for model, level in (
        (["--model", clip], "teacher"),
        (["--model", wave, "--text-model", clip], "fine"),
        (["--model", half], controls.HALF),
    ):
        out = tmp_path / level
        assert lightning(["evaluate", *model, *data, "--out", str(out)]) == 0
        (file,) = out.glob("*.json")
        assert json.loads(file.read_text())["metrics"]["top1"] == result["levels"]["test"][level]["accuracy"]


def test_the_file_for_several_data_sets_has_the_answers_of_the_result(outcome):
    folder, result = outcome
    kept = answers.read(folder / "runs/photos/shapes-drawn/results/retrain/photos-shapes-drawn-waveclip.npz")
    for split, levels in result["levels"].items():
        found = kept[split].correct.mean(axis=1).tolist()
        assert found == pytest.approx([levels[level]["accuracy"] for level in ("coarse", "fine")])


def test_controls_have_the_students_training(tmp_path):
    pictures = PhotoSet("p", "p", *RECIPES, tmp_path, "make", "by nobody")
    whole, more = (read_recipe(recipe)["trainer"]["max_steps"] for recipe in RECIPES)
    student = read_recipe(RECIPES[1])["model"]["init_args"]
    runs = pictures.runs(seed=3)
    assert [run.steps for run in runs.values()] == [whole, more, more, whole + more]
    assert runs[TRAINED_ON].settings == {"model": {"learning_rate": student["learning_rate"]}}
    assert runs[HALF].settings == {"model": {"image_size": 16}, "data": {"image_size": 16}}
    assert {run.seed for run in runs.values()} == {3}
    ending = "-seed3.safetensors"
    assert [run.output.name for run in runs.values()] == [
        f"p_clip{ending}",
        f"p_waveclip{ending}",
        f"p_clip_trained_on{ending}",
        f"p_clip_half{ending}",
    ]


@pytest.fixture
def sittings(monkeypatch, tmp_path):
    """Pictures whose trainings are counted, and the list of those that ran; every machine has its own run directory."""
    trained = []

    def counted(run, folder, **others):
        trained.append(run.name)
        return untrained(run, folder, **others)

    monkeypatch.setattr(photo_models, "fit", counted)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "one machine"))
    data = {"name": str(stand_in(tmp_path / "drawn")), "held_out": None, "batch_size": 8}
    small = spelling(["a photo of a circle."], "common/photos_clip.json")
    small["vision_cfg"] |= {"width": 64, "layers": 1}
    architecture = str(written_once(tmp_path / "small.json", small, "drawn"))
    return PhotoSet("p", "p", *RECIPES, tmp_path / "out", "make", "by nobody", data, architecture), trained


def test_a_series_goes_on_in_another_sitting_on_another_machine(sittings, monkeypatch, tmp_path):
    pictures, trained = sittings
    train(pictures, range(2), smoke=False, only="p-clip")
    train(pictures, range(2), smoke=False, only="p-*clip-seed1")
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "another machine"))
    train(pictures, range(2), smoke=False, only="p-clip-half")
    sequence = ["p-clip", "p-clip-seed1", "p-waveclip-seed1", "p-clip-half"]
    assert trained == sequence
    trainings, weights = train(pictures, range(2), smoke=False)
    rest = ["p-waveclip", "p-clip-trained-on", "p-clip-trained-on-seed1", "p-clip-half-seed1"]
    assert trained == sequence + rest, "what was there is taken"
    assert train(pictures, range(2), smoke=False) == (trainings, weights) and len(trained) == 8
    assert all(file.is_file() for of_seed in weights for file in of_seed.values())
    record = json.loads((tmp_path / "out/results/retrain/p-waveclip-seed1.json").read_text())
    assert record == trainings[5] and record["steps"] == read_recipe(RECIPES[1])["trainer"]["max_steps"]


def test_weights_have_a_card_with_their_credit_as_soon_as_they_are_trained(sittings, tmp_path):
    pictures, trained = sittings
    card = tmp_path / "out/weights/p_clip-seed1.md"
    for _ in range(2):
        train(pictures, range(2), smoke=False, only="p-clip-seed1")
        text = card.read_text()
        assert "7 minutes on CPU" in text and text.endswith("by nobody\n")
        card.unlink()  # the next sitting writes it again
    assert trained == ["p-clip-seed1"]


def test_a_record_of_another_training_is_refused(sittings, monkeypatch, tmp_path):
    pictures, trained = sittings
    (result,), (weights,) = train(pictures, range(1), smoke=False, only="p-clip")
    record = pictures.record(pictures.runs()[CLIP])
    for what, other in (("steps", 5), ("settings", {"model": {"learning_rate": 1}}), ("recipe", "x.yaml 0")):
        record.write_text(json.dumps(result | {what: other}))
        with pytest.raises(ValueError, match=rf"p-clip\.json tells of another training: it has {what} .*{other!s:.5}"):
            train(pictures, range(1), smoke=False)
    record.write_text(json.dumps(result))
    weights[CLIP].write_bytes(b"others")
    with pytest.raises(ValueError, match=f"it has weights {result['weights']}, here it is .* remove it and .*p-clip "):
        train(pictures, range(1), smoke=False)
    weights[CLIP].unlink()
    with pytest.raises(ValueError, match="here it is missing; bring back what it tells of"):
        train(pictures, range(1), smoke=False)
    assert trained == ["p-clip"]


def test_what_a_recipe_shows_and_saves_is_no_other_training():
    recipe = read_recipe("common/photos_clip.yaml")
    quiet = {name: value for name, value in recipe["trainer"].items() if name not in ("callbacks", "log_every_n_steps")}
    assert training_of(recipe) == training_of({**recipe, "trainer": quiet})
    averaged = [{"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging"}]
    assert training_of(recipe) != training_of({**recipe, "trainer": {**quiet, "callbacks": averaged}})
    assert training_of(recipe) != training_of({**recipe, "trainer": {**quiet, "precision": "bf16-mixed"}})


def test_a_run_that_began_with_another_recipe_does_not_go_on(sittings, monkeypatch):
    pictures, _ = sittings

    def interrupted(*given, **others):
        raise ValueError("interrupted")

    monkeypatch.setattr(photo_models, "fit", interrupted)
    for _ in range(2):
        with pytest.raises(ValueError, match="interrupted"):
            train(pictures, range(1), smoke=False, only="p-clip")
    monkeypatch.setattr(photo_models.Run, "steps", 7)
    with pytest.raises(
        ValueError, match=r"p-clip/asked\.json tells of another training: it has steps \d+, here it is 7"
    ):
        train(pictures, range(1), smoke=False, only="p-clip")


def test_a_part_needs_its_teacher_and_a_name_that_exists(sittings):
    pictures, trained = sittings
    with pytest.raises(ValueError, match=r"p-waveclip starts from p-clip, which is not finished in .*out"):
        train(pictures, range(1), smoke=False, only="p-waveclip")
    with pytest.raises(ValueError, match=r"ONLY=p-clip-seed1 is no run of SEEDS=1; there are p-clip, p-waveclip"):
        train(pictures, range(1), smoke=False, only="p-clip-seed1")
    assert trained == []


def test_only_trains_a_part_and_reads_no_test_picture(sittings, monkeypatch, tmp_path):
    _, trained = sittings
    for name, value in (("PHOTOS", tmp_path / "drawn"), ("OUT", tmp_path / "out"), ("ONLY", "photos-drawn-clip")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(photos, "evaluate", lambda *given: pytest.fail("it evaluated"))
    assert photos.run() is None and trained == ["photos-drawn-clip"]
    assert [path.name for path in (tmp_path / "out/results").iterdir()] == ["retrain"], "no read of test is logged"


def test_photographs_are_cropped_and_flipped():
    for recipe in RECIPES:
        settings = read_recipe(recipe)["data"]["init_args"]
        assert settings["flip"] is True and settings["crop"][0] < 0.9


def test_the_vocabulary_is_that_of_the_prompts():
    architecture = spelling(["a photo of a red panda.", "a photo of an owl."], "common/photos_clip.json")
    text = architecture["text_cfg"]
    assert Tokenizer(text["context_length"], text["vocabulary"])(["a photo of a red owl."]).shape == (1, 16)
    with pytest.raises(ValueError, match="'cat'"):
        Tokenizer(text["context_length"], text["vocabulary"])(["a photo of a cat."])
    assert Model(architecture).image_tower.image_size == 32


def test_runs_of_other_classes_under_the_same_name_are_refused(tmp_path):
    file = tmp_path / "name" / "architecture.json"
    for _ in range(2):
        assert written_once(file, {"classes": 2}, "/data/name") == file
    with pytest.raises(ValueError, match=r"other classes than those of /data/name.* give this folder another name"):
        written_once(file, {"classes": 3}, "/data/name")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set PHOTOS to a folder with one folder a class"),
        ({"PHOTOS": "/no/such"}, "PHOTOS=/no/such: no folder at /no/such"),
        ({"PHOTOS": "drawn", "SEEDS": "none"}, "SEEDS=none is no number of trainings"),
        ({"PHOTOS": "drawn/circle"}, "it holds no folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(monkeypatch, tmp_path, variables, message):
    stand_in(tmp_path / "drawn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(photo_models, "fit", lambda *arguments, **others: pytest.fail("it trained"))
    for name in ("PHOTOS", "SEEDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        photos.run()


def test_results_go_where_out_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PHOTOS", "/data/My Cats")
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.delenv("OUT", raising=False)
    assert photos.folder() == tmp_path / "photos/my-cats/results"
    monkeypatch.setenv("OUT", "benchmarks")
    assert str(photos.folder()) == "benchmarks/results"
