"""The tables of README and docs are the result files', and the runner writes where it says."""

import json
import re

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import __main__ as runner
from benchmarks.registry import ACTIONS, BENCHMARKS, Action, Benchmark, benchmark, benchmark_of
from benchmarks.report import pages as report
from benchmarks.report.pages import OTHERS, PAGES, fill, table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_holds_what_the_result_files_say(page):
    text = page.read_text()
    assert fill(text) == text, f"{page.name} differs from benchmarks/results; run `make report`"


def test_every_benchmark_stands_on_a_page():
    shown = "".join(page.read_text() for page in PAGES)
    tables = set(re.findall(r"<!-- table: (\S+) -->", shown))
    named = set(re.findall(r"reproduce-([a-z0-9-]+)", shown))
    assert {entry.name for entry in BENCHMARKS} <= tables | named and set(OTHERS) <= tables


def test_markdown_beside_each_result_is_its_rendering():
    for path in runner.RESULTS.glob("*.json"):
        assert path.with_suffix(".md").read_text() == table(path.stem), f"{path.name}: run `make report`"


def test_tables_are_replaced_between_their_marks():
    text = "a\n<!-- table: x -->\nold\n<!-- /table -->\nb\n<!-- table: y -->\n<!-- /table -->\n"
    filled = fill(text, lambda name: f"| {name} |\n")
    assert "old" not in filled and "| x |" in filled and "| y |" in filled
    assert filled.startswith("a\n") and fill(filled, lambda name: f"| {name} |\n") == filled


def test_what_was_not_run_says_how_to(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert table("speed") == "Not run: `python -m benchmarks speed`.\n"


def test_devices_stand_one_after_another_and_of_deployment_the_earlier_ones_are_linked(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for device, date in (("old GPU", "2026-01-01"), ("new GPU", "2026-01-02")):
        run = {"device": device, "date": date, "rounds": 5, "workers": 2, "batch": 8, "threads": 1, "torch": "2"}
        for name in ("loading", "deploy"):
            result = {"name": name, "conditions": run, "rows": [], "costs": {"tables": {}, "missing": {device: "none"}}}
            (tmp_path / f"{name}-{device.replace(' ', '-')}.json").write_text(json.dumps(result))
    loading, deploy = table("loading"), table("deploy-costs")
    assert loading.index("On new GPU:") < loading.index("On old GPU:")
    assert "On new GPU:" not in table("loading-old-GPU")
    assert "new GPU (none)" in deploy and "old GPU (none)" not in deploy
    assert "Earlier, on old GPU: [all tables](../benchmarks/results/deploy-old-gpu.md)" in deploy


def test_unknown_table_is_named():
    with pytest.raises(ValueError, match="no benchmark 'tabel2'"):
        table("tabel2")


class Maker:
    """Stands for a benchmark's module: it lacks its one run until that was trained."""

    trained = False

    def run(self, smoke):
        return {"name": "table2", "smoke": smoke, "trained": self.trained}

    def render(self, result):
        return {"md": "| a |\n|---|\n", "figures": {"drawn": Figure()}}

    def missing(self, result):
        return [] if result["trained"] else [("its run", "python -m benchmarks retrain")]


@pytest.fixture
def maker(monkeypatch, tmp_path):
    made = Maker()
    monkeypatch.setattr(Benchmark, "load", lambda entry: made)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    return made


def test_smoke_runs_never_touch_the_results(maker, monkeypatch, tmp_path):
    monkeypatch.setenv("SMOKE", "1")
    runner.run_one(benchmark("table2"), Console(quiet=True))
    assert not (tmp_path / "results").exists()
    assert json.loads((tmp_path / "runs/smoke/table2.json").read_text())["smoke"] is True
    monkeypatch.setenv("SMOKE", "0")
    runner.run_one(benchmark("table2"), Console(quiet=True))
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"table2.json", "table2.md", "drawn.png", "drawn.svg"}


def test_a_benchmark_may_say_where_its_result_goes(maker, monkeypatch, tmp_path):
    maker.folder = lambda: tmp_path / "elsewhere"
    monkeypatch.setenv("SMOKE", "0")
    runner.run_one(benchmark("photos"), Console(quiet=True))
    assert (tmp_path / "elsewhere/table2.md").is_file() and not (tmp_path / "results").exists()


def test_where_only_a_part_was_trained_nothing_is_written(maker, monkeypatch, tmp_path):
    maker.run = lambda smoke: None
    monkeypatch.setenv("SMOKE", "0")
    runner.run_one(benchmark("photos"), Console(quiet=True))
    assert not (tmp_path / "results").exists()


def test_results_of_several_data_sets_belong_to_one_benchmark():
    assert benchmark_of("photos-cifar10") is benchmark("photos") and benchmark_of("speed") is benchmark("speed")
    assert benchmark_of("speed-nvidia-h200") is benchmark("speed")


@pytest.mark.parametrize(("smoke", "trains"), [("0", 1), ("1", 0)])
def test_what_a_table_lacks_is_trained_first_but_not_by_a_smoke_run(maker, monkeypatch, smoke, trains):
    asked = []

    def train(action, arguments=()):
        asked.append((action.name, *arguments))
        maker.trained = True
        return 0

    monkeypatch.setattr(Action, "main", train)
    monkeypatch.setenv("SMOKE", smoke)
    for _ in range(2):
        runner.run_one(benchmark("patchrank-table1"), Console(quiet=True))
    assert asked == [("patchrank-runs",)] * trains


def test_a_users_mistake_is_one_line_and_the_others_still_run(monkeypatch, capsys):
    ran = []

    def run_one(entry, console):
        ran.append(entry)
        if entry.name == "table2":
            raise ValueError("set both or neither")

    monkeypatch.setattr(runner, "run_one", run_one)
    for name in ("EFFCLIP_DEBUG", "EFFCLIP_DATA", "PHOTOS", "SMOKE"):
        monkeypatch.delenv(name, raising=False)
    assert runner.main(["all"]) == 1
    assert ran == [entry for entry in BENCHMARKS if entry.name not in ("fashion-mnist", "photos")]
    printed = capsys.readouterr().out
    assert "benchmarks: error: table2: set both or neither" in printed
    assert "fashion-mnist: not run, EFFCLIP_DATA is not set" in printed


@pytest.mark.parametrize("variables", [("EFFCLIP_DATA", "PHOTOS"), ("SMOKE",)])
def test_all_is_all_where_data_is_there_or_stood_in_for(monkeypatch, variables):
    ran = []
    monkeypatch.setattr(runner, "run_one", lambda entry, console: ran.append(entry))
    for name in variables:
        monkeypatch.setenv(name, "1")
    assert runner.main(["all"]) == 0
    assert ran == list(BENCHMARKS)


def test_help_lists_every_name(capsys):
    assert runner.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(entry.name in printed for entry in (*BENCHMARKS, *ACTIONS)) and "SMOKE" in printed
