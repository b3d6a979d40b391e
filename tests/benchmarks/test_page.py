"""The report page: every table and figure, the papers' numbers beside ours, and nothing from elsewhere."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from benchmarks.__main__ import BENCHMARKS, RESULTS
from benchmarks.exits import NEVER
from benchmarks.page import build, gallery
from benchmarks.page.build import command, papers, stored
from benchmarks.page.comparisons import Comparison, compare
from benchmarks.page.frontier import Axis
from benchmarks.page.markup import conditions, markdown
from benchmarks.sweep import BINS, margins, sweep
from tests.benchmarks.samples import COSTS, PICTURES, outcomes, write_results
from tests.test_docs import MAKE_TARGETS

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Reader(HTMLParser):
    """Finds elements that are not closed, and what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.data = [], [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.data.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    result = write_results(folder)
    return build(folder), result


def test_it_is_whole_and_fetches_nothing(sample):
    for page in (sample[0], build(RESULTS)):
        fetched = read(page).fetched
        assert all(value.startswith(("data:image/", "#")) for value in fetched)
        assert "url(" not in page and "@import" not in page
        assert "default-src 'none'" in page, "and a browser is told to"


def test_every_table_and_figure_is_there_with_its_command(sample):
    said = " ".join(read(sample[0]).data)
    for paper in papers():
        for item in paper["items"]:
            assert item["item"] in said and item["about"] in said
            made_by = command(item["benchmark"]) if "benchmark" in item else item["why"]
            assert made_by in said
    for name in BENCHMARKS:
        assert command(name) in said


def test_contents_name_benchmarks_or_say_why_not():
    for paper in papers():
        for item in paper["items"]:
            assert ("benchmark" in item) != ("why" in item), item
            assert item.get("benchmark", "table2") in BENCHMARKS, item
    for name in BENCHMARKS:
        kind, *words = command(name).split()
        assert words[0] in MAKE_TARGETS if kind == "make" else words == ["-m", "benchmarks", name]


def test_what_has_no_result_says_how_to_get_one(tmp_path):
    page = build(tmp_path)
    assert stored(tmp_path) == {} and 'id="frontier-data"' not in page
    (listed,) = re.findall(r'<h2 id="not-run".*?</section>', page, re.S)
    for name in BENCHMARKS:
        assert command(name) in unescape(listed)
    assert "0 of" in page


def test_each_article_has_its_own_figures(tmp_path):
    for name in ("mlip-table1", "mlip-table10"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "rows": []}))
        (tmp_path / f"{name}.md").write_text("")
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "mlip-table1-again.png")
    found = {name: [path.name for path in of.figures] for name, of in stored(tmp_path).items()}
    assert found == {
        "mlip-table1": ["mlip-table1-again.png", "mlip-table1.png"],
        "mlip-table10": ["mlip-table10.png"],
    }


def test_a_result_that_measured_nothing_counts_as_not_run(tmp_path):
    missing = {"name": "mlip-fig5", "conditions": {}, "missing": ["make retrain ONLY=guide"]}
    (tmp_path / "mlip-fig5.json").write_text(json.dumps(missing))
    (tmp_path / "mlip-fig5.md").write_text("Not run.\n")
    assert stored(tmp_path) == {} and "make reproduce-mlip-fig5" in build(tmp_path)


def test_the_sliders_data_are_the_results(sample):
    page, result = sample
    (packed,) = re.findall(r'id="frontier-data">(.*?)</script>', page, re.S)
    data = json.loads(packed)
    assert data == {key: result[key] for key in ("sweep", "pictures", "teacher", "examples")}
    assert "several words</b>" not in page, "a name is text, also inside a script"


def test_sweep_counts_what_a_gate_does_picture_by_picture():
    of = outcomes()
    found = sweep(of, COSTS)
    assert found["threshold"][0] == 0 and found["threshold"][-1] == NEVER and len(found["threshold"]) == 202
    for place in (0, 1, 77, 200, 201):
        threshold, right, refined = found["threshold"][place], 0, 0
        for margin, coarse, fine in zip(of.margin, of.coarse, of.fine, strict=True):
            goes_on = bool(margin < threshold)
            refined += goes_on
            right += bool(fine if goes_on else coarse)
        assert (found["refined"][place], found["right"][place]) == (refined, right)
        assert found["gmacs"][place] == pytest.approx((0.008 * (PICTURES - refined) + 0.032 * refined) / PICTURES)


def test_margins_are_counted_once_by_who_is_right():
    of = outcomes()
    found = margins(of)
    assert sum(map(sum, found.values())) == PICTURES and {len(counts) for counts in found.values()} == {BINS}
    assert sum(found["both"]) == int((of.coarse & of.fine).sum())
    assert sum(found["fine alone"]) + sum(found["both"]) == int(of.fine.sum())
    sure = sum(sum(counts[BINS // 2 :]) for counts in found.values())
    assert sure == int((of.margin >= 0.5).sum())


@pytest.mark.parametrize(
    ("compared", "cells"),
    [
        (Comparison("a", 16.87, 16.8678, "GMACs"), ["a, GMACs", "16.87", "16.87", "+0.0 %"]),
        (Comparison("a", 6.22, 6.1585, "GMACs"), ["a, GMACs", "6.22", "6.16", "-1.0 %"]),
        (Comparison("a", 66.3, 66.06, "%"), ["a, %", "66.3", "66.1", "-0.2"]),
        (Comparison("a", 2.1, -0.34, "points", False), ["a, points", "+2.1", "-0.3", "other scale"]),
        (Comparison("a", 197, 198, "tokens"), ["a, tokens", "197", "198", "+0.5 %"]),
        (Comparison("a", 41.1, None, "%"), ["a, %", "41.1", "not run", "–"]),
    ],
)
def test_a_comparison_takes_a_difference_of_like_with_like_alone(compared, cells):
    assert compared.cells() == cells


def test_every_printed_number_of_table_2_stands_beside_ours():
    result = json.loads((RESULTS / "table2.json").read_text())
    found = compare("table2", result)
    for row in result["paper_scale"]["rows"]:
        own = [each for each in found if each.what.startswith(row["method"])]
        assert {each.paper for each in own} >= {row["paper_gflops"], row["paper_accuracy"]}
        assert {row["gmacs"], row["gmacs_paper"]} <= {each.ours for each in own}
    assert compare("speed", {}) == []


def test_an_ablation_is_compared_by_what_it_gains():
    rows = [
        {"method": "DeCLIP", "run": None, "paper": {"top1": 47.9}, "seeds": {}},
        {"method": "CLIP", "run": "clip", "paper": {"top1": 16.3}, "seeds": {"0": {"test": 0.5}, "1": {"test": 0.52}}},
        {"method": "MLIP", "run": "mlip", "paper": {"top1": 18.4}, "seeds": {"0": {"test": 0.53}}},
        {"method": "extra", "run": "extra", "paper": {}, "seeds": {}},
    ]
    found = {each.what: each for each in compare("mlip-table6", {"rows": rows})}
    assert found["DeCLIP, zero-shot"].ours is None and found["CLIP, zero-shot"].ours == pytest.approx(51)
    gain = found["MLIP against CLIP"]
    assert (gain.paper, gain.ours, gain.same) == (pytest.approx(2.1), pytest.approx(3), False), (
        "the seed that both have"
    )
    assert len(found) == 4


def test_evaluated_tables_are_compared_cell_by_cell():
    row = {"method": "MLIP", "values": [65.8, None, 48.5, 57.2], "ours": [65.0, 30.0, None]}
    found = compare("mlip-table2", {"columns": [["C10", "C100", "F101"]], "blocks": [[row]]})
    assert [(each.what, each.paper, each.ours) for each in found] == [
        ("MLIP, C10", 65.8, 65.0),
        ("MLIP, F101", 48.5, None),
    ]


def test_hours_are_compared_by_their_ratio():
    printed = [{"method": "CLIP", "gpu_hours": 361}, {"method": "MLIP", "gpu_hours": 370}]
    (found,) = compare("mlip-table10", {"paper": printed, "rows": [{"run": "mlip", "of_reference": 1.4}]})
    assert found.cells()[1:] == ["1.02", "1.40", "other scale"]


def test_patch_rankings_losses_and_means_stand_beside_ours():
    headline = {"all": [-0.004, -0.01, 0.002]}
    rows = [{"row": "EViT", "accuracy": {"sketch": [0.5, 0.6], "blur": [0.65]}}, {"row": "ToMe", "accuracy": {}}]
    found = {each.what: each for each in compare("patchrank-table1", {"rows": rows, "headline": headline})}
    evit, tome = (found[f"{name} at one keep rate, mean over data sets"] for name in ("EViT", "ToMe"))
    assert evit.paper == pytest.approx(64.375) and evit.ours == pytest.approx(60) and tome.ours is None
    lost = found["lost by dropping 40 % of the patches, after tuning"]
    assert (lost.paper, lost.ours) == (0.3, pytest.approx(0.4))


def test_kept_patches_are_those_not_veiled():
    result = {
        "conditions": {"keep": 0.5},
        "shown": [{"name": "owl & key", "png": "AAAA"}],
        "grid": 2,
        "kept": {"class attention": [[0, 3]], "predictor": [[1, 2]]},
    }
    page = gallery.section(result)
    read(page)
    first, second = re.findall(r'<path class="veil" d="([^"]*)"', page)
    assert first == "M48 0h48v48h-48zM0 48h48v48h-48z" and second == "M0 0h48v48h-48zM48 48h48v48h-48z"
    assert "owl &amp; key: what predictor keeps" in page and "50 % of the patches" in page


def test_markdown_is_shown_and_its_html_is_not_obeyed():
    shown = markdown("| a | b |\n|---|---:|\n| `x` | <b>1</b> |\n\n**bold**\n", "what it is about")
    assert '<th scope="col">a</th>' in shown and 'aria-label="what it is about"' in shown
    assert "<strong>bold</strong>" in shown and "&lt;b&gt;1&lt;/b&gt;" in shown
    read(shown)


def test_conditions_of_any_kind_are_text():
    shown = conditions({"clean": True, "seeds": None, "batch": [1, 64], "weights": {"a": "<0>"}})
    assert unescape(shown).count("<dt>") == 4
    assert all(part in shown for part in ("yes", "–", "1, 64", "a: &lt;0&gt;"))


def test_an_axis_is_linear_with_round_ticks():
    axis = Axis(0.0, 0.034, 52, 428)
    assert axis.at(0) == 52 and axis.at(0.034) == 428 and axis.at(0.017) == 240
    assert axis.ticks() == pytest.approx([0, 0.01, 0.02, 0.03])
    assert Axis(63.6, 67.7, 236, 14).ticks() == pytest.approx([64, 65, 66, 67])
    assert torch.tensor(axis.ticks()).diff().std() < 1e-9
