"""The report page: every table and figure, the papers' numbers beside ours, and nothing from elsewhere."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from benchmarks import RESULTS
from benchmarks.cells import Comparison
from benchmarks.printed import paper_numbers
from benchmarks.registry import ABSENT, ACTIONS, BENCHMARKS, PAPERS, benchmark
from benchmarks.report.page import build, gallery
from benchmarks.report.page.build import stored
from benchmarks.report.page.markup import conditions, markdown
from benchmarks.report.page.slider import Axis, _histogram
from benchmarks.waveclip import highres_embedded
from benchmarks.waveclip.sweep import BINS, margins, sweep
from common.early_exit import NEVER
from tests.benchmarks.samples import COSTS, PICTURES, answers, write_results

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
    words = " ".join(read(sample[0]).data)
    for entry in BENCHMARKS:
        assert entry.command in words and (entry.item or entry.about) in words
    for entry in ABSENT:
        assert entry.item in words and entry.about in words and entry.why in words


def test_a_table_without_a_number_of_ours_shows_the_papers_and_does_not_count_as_run(tmp_path):
    for ending in ("json", "md"):
        name = f"mlip-table4.{ending}"
        (tmp_path / name).write_text((RESULTS / name).read_text())
    page = build(tmp_path)
    (listed,) = re.findall(r'<h2 id="not-run".*?</section>', page, re.S)
    assert 'id="mlip-table4"' in page and "<td" in page and "98.5" in page
    assert "<dd>0 of " in page and "not run: <code>lightning fit -c mlip/yfcc15m.yaml</code>" in page
    rows = [unescape(re.sub("<[^>]+>", "|", row)) for row in listed.split("<tr>") if "MLIP, Table 4" in row]
    assert ["60 of its numbers" in rows[0], "lightning fit" in rows[0]] == [True, True]
    assert "12 of its numbers" in rows[1] and "UniCLIP" in rows[1] and "–" in rows[1]


def test_what_a_result_lacks_is_listed_with_what_would_make_it():
    def lacking(result, name):
        return benchmark(name).missing(result)

    rows = [
        {"method": "CLIP", "run": "clip", "seeds": 2},
        {"method": "MLIP, 90 %", "run": "mlip-part", "seeds": 0},
        {"method": "FILIP", "run": "filip", "seeds": 0},
        {"method": "SLIP", "run": None, "seeds": 0},
    ]
    train = "python -m benchmarks mlip-shapes-runs"
    assert lacking({"planned": 3, "rows": rows}, "mlip-table3") == [
        ("1 of 3 runs are missing: CLIP", train),
        ("3 of 3 runs are missing: MLIP, 90 %; FILIP", train),
    ]
    ((others, _),) = lacking({"planned": 2, "rows": rows[:1]}, "mlip-table10")  # rows that came after the result
    assert others.startswith("2 of 2 runs are missing: frequency;") and "; slip;" in others
    train = "python -m benchmarks patchrank-runs"
    rows = [
        {"row": "random", "accuracy": {"blur": [0.5]}},
        {"row": "A-ViT", "accuracy": {"blur": [0.5, 0.5, 0.5], "sketch": [0.5]}},
    ]
    assert lacking({"rows": rows}, "patchrank-table1") == [("2 of 3 runs are missing: A-ViT", train)]
    whole, two = ([{"keep": 1.0, "accuracy": [0.5]}, {"keep": 0.9, "accuracy": [0.5] * seeds}] for seeds in (3, 2))
    curves = [{"curve": "Patch Ranking", "points": points} for points in (whole, two, two)]
    assert lacking({"rows": curves[:1]}, "patchrank-fig1") == []
    assert lacking({"rows": curves}, "patchrank-fig1") == [("1 of 3 runs are missing: Patch Ranking", train)]
    assert lacking({"conditions": {"seeds": 3}}, "patchrank-fig5") == []
    assert lacking({"missing": {"MLIP": "train it"}}, "frontier") == [("not trained: MLIP", "train it")]
    ((_, commands),) = lacking({"embedded": None}, "waveclip-highres")
    assert commands.split(" && ") == list(highres_embedded.COMMANDS)
    two = {"embedded": {"seeds": {"shapes-teacher96": 3, "shapes-waveclip96": 2}}}
    one_lacks = [("1 of 3 runs of shapes-waveclip96", highres_embedded.COMMANDS[1])]
    assert lacking(two, "waveclip-highres") == one_lacks
    assert lacking({}, "speed") == []


def test_every_table_and_figure_of_the_papers_has_an_entry():
    """Their numbers, as the texts have them; two texts lack some of their own."""
    printed = {
        "WAVECLIP": {*("Table 1", "Table 2"), *(f"Figure {number}" for number in range(1, 5))},
        "MLIP": {*(f"Table {number}" for number in range(1, 14)), *(f"Figure {number}" for number in range(1, 8))},
        "Patch Ranking": {
            *(f"Table {number}" for number in range(1, 8)),
            *(f"Figure {number}" for number in range(1, 6)),
        },
    }
    for paper in PAPERS:
        items = [entry.item for entry in (*BENCHMARKS, *ABSENT) if entry.paper == paper]
        numbered = {name for item in items for name in named(item)}
        assert printed[paper] <= numbered and len(items) == len(set(items))


def named(item):
    """The tables or figures that an entry stands for: "Tables 11 to 13" are three."""
    kind, *numbers = re.findall(r"Table|Figure|\d+", item) or [""]
    first, last = (int(numbers[0]), int(numbers[-1])) if numbers else (1, 0)
    return [f"{kind} {number}" for number in range(first, last + 1)]


def test_names_are_commands_of_their_own():
    names = [entry.name for entry in (*BENCHMARKS, *ACTIONS)]
    assert len(names) == len(set(names)) and "all" not in names
    for entry in BENCHMARKS:
        assert entry.trains is None or entry.trains.split()[0] in [a.name for a in ACTIONS]
        maker = entry.load()
        assert callable(maker.run) and callable(maker.render)


def test_what_has_no_result_says_how_to_get_one(tmp_path):
    page = build(tmp_path)
    assert stored(tmp_path) == {} and 'id="frontier-data"' not in page
    (listed,) = re.findall(r'<h2 id="not-run".*?</section>', page, re.S)
    for entry in BENCHMARKS:
        assert entry.command in unescape(listed)
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
    exits = answers()
    points = sweep(exits, COSTS)
    assert points["threshold"][0] == 0 and points["threshold"][-1] == NEVER and len(points["threshold"]) == 202
    for place in (0, 1, 77, 200, 201):
        threshold, right, refined = points["threshold"][place], 0, 0
        for margin, coarse, fine in zip(exits.confidence, exits.first, exits.second, strict=True):
            goes_on = bool(margin < threshold)
            refined += goes_on
            right += bool(fine if goes_on else coarse)
        assert (points["refined"][place], points["right"][place]) == (refined, right)
        assert points["gmacs"][place] == pytest.approx((0.008 * (PICTURES - refined) + 0.032 * refined) / PICTURES)


def test_margins_are_counted_once_by_who_is_right():
    exits = answers()
    histograms = margins(exits)
    assert sum(map(sum, histograms.values())) == PICTURES
    assert {len(counts) for counts in histograms.values()} == {BINS}
    assert sum(histograms["both"]) == int((exits.first & exits.second).sum())
    assert sum(histograms["fine alone"]) + sum(histograms["both"]) == int(exits.second.sum())
    confident = sum(sum(counts[BINS // 2 :]) for counts in histograms.values())
    assert confident == int((exits.confidence >= 0.5).sum())


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
    found = benchmark("table2").compare(result)
    for row in result["paper_scale"]["rows"]:
        own = [each for each in found if each.what.startswith(row["method"])]
        assert {each.paper for each in own} >= {row["paper_gflops"], row["paper_accuracy"]}
        assert {row["gmacs"], row["gmacs_paper"]} <= {each.ours for each in own}
    saved = {each.paper: each.ours for each in found if "saved" in each.what}
    assert saved == {
        16.8: pytest.approx(result["paper_scale"]["savings"]["gmacs"]),
        30.6: pytest.approx(33.45, abs=0.01),
    }
    assert benchmark("speed").compare({}) == []


def test_an_ablation_is_compared_by_what_it_gains():
    rows = [
        {"method": "UniCLIP", "run": None, "paper": {"top1": 47.9}, "evaluated": {}, "seeds": 0},
        {"method": "CLIP", "run": "clip", "paper": {"top1": 16.3}, "evaluated": {}, "seeds": 2}
        | {"ours": {"test": [0.51, 0.5, 0.52]}, "gains": {}},
        {"method": "MLIP", "run": "mlip", "paper": {"top1": 18.4}, "evaluated": {}, "seeds": 1}
        | {"ours": {"test": [0.53, 0.52, 0.54]}, "gains": {"test": [0.03, 0.02, 0.04]}},
        {"method": "extra", "run": "extra", "paper": {}, "evaluated": {}, "seeds": 0},
    ]
    found = {each.what: each for each in benchmark("mlip-table6").compare({"rows": rows})}
    assert found["UniCLIP, zero-shot"].cells()[1:] == ["47.9", "not part of this suite", "–"]
    assert found["CLIP, zero-shot"].ours == pytest.approx(51)
    gain = found["MLIP against CLIP, zero-shot"]
    assert (gain.paper, gain.ours, gain.same) == (pytest.approx(2.1), pytest.approx(3), False)
    assert len(found) == 4


@pytest.mark.parametrize("number", [3, 5, 6, 7, 8])
def test_every_printed_number_of_an_ablation_stands_beside_ours(number):
    rows = json.loads((RESULTS / f"mlip-table{number}.json").read_text())["rows"]
    found = {each.what: each for each in benchmark(f"mlip-table{number}").compare({"rows": rows})}
    known = [each for what, each in found.items() if " against " not in what]
    assert sorted(each.paper for each in known) == sorted(value for row in rows for value in row["paper"].values())
    for row in rows:
        for key, title in (("i2t", "I2T R@1"), ("t2i", "T2I R@1")):
            if key in row["paper"] and row["seeds"]:
                ours = [100 * seed[key] for seed in row["seeds"].values()]
                assert found[f"{row['method']}, {title}"].ours == pytest.approx(sum(ours) / len(ours))


def test_evaluated_tables_are_compared_cell_by_cell():
    row = {"method": "MLIP", "values": [65.8, None, 48.5, 57.2], "ours": [65.0, 30.0, None]}
    found = benchmark("mlip-table2").compare({"columns": [["C10", "C100", "F101"]], "blocks": [[row]]})
    assert [(each.what, each.paper, each.ours) for each in found] == [
        ("MLIP, C10", 65.8, 65.0),
        ("MLIP, F101", 48.5, None),
        ("MLIP, mean of 3", 57.2, None),
    ]


def test_hours_are_compared_by_their_ratio():
    printed = paper_numbers("mlip")["table10"]
    rows = [
        {"run": "clip", "of_reference": 1.0, "seeds": 2, "accuracy": [0.4, 0.39, 0.41]},
        {"run": "mlip", "of_reference": 1.4, "seeds": 1, "accuracy": [0.42, 0.41, 0.43]},
    ]
    found = {each.what: each.cells() for each in benchmark("mlip-table10").compare({"paper": printed, "rows": rows})}
    assert found["MLIP's training, in CLIP's time (ours: a step's)"][1:] == ["1.02", "1.40", "other scale"]
    assert found["MLIP's zero-shot for its time, in CLIP's"][1:] == ["1.10", "0.75", "other scale"]
    assert found["CLIP, zero-shot"] == ["CLIP, zero-shot, %", "16.3", "40.0", "other scale"]
    assert found["SLIP, training"] == ["SLIP, training, GPU hours", "488", "not run", "–"]
    rows[0] |= {"seeds": 0, "accuracy": None}
    found = {each.what: each.ours for each in benchmark("mlip-table10").compare({"paper": printed, "rows": rows})}
    assert found["MLIP's zero-shot for its time, in CLIP's"] is found["CLIP, zero-shot"] is None


def test_the_printed_numbers_beside_costs_are_there_too():
    table9 = json.loads((RESULTS / "mlip-table9.json").read_text())
    found = [each.paper for each in benchmark("mlip-table9").compare(table9)]
    assert {value for row in table9["paper"] for value in row.values() if not isinstance(value, str)} == set(found)
    entry = benchmark("patchrank-costs")
    costs = entry.compare(json.loads(entry.files(RESULTS)[0].read_text()))
    assert [each.cells()[1:] for each in costs] == [
        ["16.80", "17.58", "+4.7 %"],
        ["16.80", "16.87", "+0.4 %"],
        ["16.80", "12.28", "-26.9 %"],
        ["16.80", "11.90", "-29.2 %"],
    ]


def test_patch_rankings_losses_and_means_stand_beside_ours():
    headline = {"all": [-0.004, -0.01, 0.002]}
    rows = [{"row": "EViT", "accuracy": {"sketch": [0.5, 0.6], "blur": [0.65]}}, {"row": "ToMe", "accuracy": {}}]
    found = {each.what: each for each in benchmark("patchrank-table1").compare({"rows": rows, "headline": headline})}
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


def test_the_label_of_an_axis_stands_clear_of_its_ticks():
    """A digit of 12 px is at most 8 wide, and half of a label of 13 px at most 10 high."""
    drawn = _histogram({"both": [20_000]})
    ticks = re.findall(r'<text class="tick" x="([^"]+)" y="[^"]+" text-anchor="end">([^<]+)<', drawn)
    (label,) = map(float, re.findall(r'<text x="([^"]+)"[^>]+rotate', drawn))
    assert max(len(text) for _, text in ticks) == len("20,000")
    assert min(float(x) - 8 * len(text) for x, text in ticks) >= label + 4


def test_an_axis_is_linear_with_round_ticks():
    axis = Axis(0.0, 0.034, 52, 428)
    assert axis.at(0) == 52 and axis.at(0.034) == 428 and axis.at(0.017) == 240
    assert axis.ticks() == pytest.approx([0, 0.01, 0.02, 0.03])
    assert Axis(63.6, 67.7, 236, 14).ticks() == pytest.approx([64, 65, 66, 67])
    assert torch.tensor(axis.ticks()).diff().std() < 1e-9
