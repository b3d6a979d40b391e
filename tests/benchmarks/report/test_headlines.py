"""README's first table: what is read from result files, and what is said where there is none."""

import json

import pytest

from benchmarks.registry import BENCHMARKS, results
from benchmarks.report import headlines
from benchmarks.report.headlines import (
    LINES,
    best_composition,
    levels_of_waveclip,
    mlip_against_clip,
    saved_by_mlip,
    table,
)
from benchmarks.waveclip.shapes import LEVELS, cosine_alone
from common.early_exit import NEVER


def test_every_line_is_read_from_the_stored_results_or_says_that_it_was_not_run():
    for line in LINES:
        stored = results(line.benchmark, headlines.RESULTS)
        assert stored or line.cells()[4] == "not run", line.measured
    assert table().count("\n|") == len(LINES) + 1


def test_nothing_is_found_where_nothing_was_run(monkeypatch, tmp_path):
    monkeypatch.setattr(headlines, "RESULTS", tmp_path)
    assert {(line.cells()[3], line.cells()[4]) for line in LINES} == {("–", "not run")}
    (tmp_path / "patchrank-table1.json").write_text(json.dumps({"headline": None, "rows": []}))
    (tuned,) = (line for line in LINES if line.read is headlines.pruned_and_tuned)
    assert tuned.cells()[4] == "not run"


def test_both_levels_stand_beside_their_teacher():
    rows = [{"row": "teacher", "seeds": 1}]
    gaps = zip(LEVELS, (-0.01, 0.02), strict=True)
    rows += [{"row": name, "seeds": 3, "difference": [gap, gap - 0.01, gap + 0.01]} for name, gap in gaps]
    said = levels_of_waveclip({"rows": rows})
    assert said == ("-1.0 [-2.0, +0.0] and +2.0 [+1.0, +3.0] points", 3)
    assert levels_of_waveclip({"rows": rows[:1]}) is None, "WaveCLIP is not trained"


def test_a_saving_stands_beside_that_of_a_cascade():
    """As soon as all controls are trained."""
    saving = {"reference": "teacher", "chosen": True, "saved": [0.5, 0.4, 0.6], "difference": [0.0, -0.001, 0.001]}
    lines = [
        saving | {"method": "WaveCLIP", "thresholds": [0.1, 0.2, 0.3]},
        saving | {"method": "cascade of two CLIPs", "thresholds": [0.1, 0.2, 0.3]},
        {"method": "WaveCLIP less cascade of two CLIPs", "reference": "teacher", "saved": [0.1, -0.05, 0.2]},
        saving | {"method": "WaveCLIP", "reference": "WaveCLIP's fine level"},
    ]
    said = headlines.saved_beside_a_cascade({"savings": lines})
    assert said == ("50.0 % [40.0, 60.0]; +10.0 [-5.0, +20.0] points", 3)
    lines[0] |= {"saved": [0.1, -0.1, 0.3]}
    assert headlines.saved_beside_a_cascade({"savings": lines}).cell.startswith("no saving shown; ")
    lines[0] |= {"chosen": False, "thresholds": [NEVER]}
    said = headlines.saved_beside_a_cascade({"savings": lines})
    assert said.cell.startswith("no saving shown: on val no threshold comes near enough; not comparable")
    lines[0]["thresholds"] = [NEVER, 0.2, 0.3]
    said = headlines.saved_beside_a_cascade({"savings": lines})
    assert said.cell.startswith("no saving shown: on val 1 of 3 seeds had no threshold near enough;")
    assert headlines.saved_beside_a_cascade({"rows": []}) is None


def test_the_papers_recipe_is_that_of_the_longest_finished_training():
    rows = [
        {"row": f"{cosine_alone(share)}, {level}", "seeds": 3, "difference": [gap, gap - 0.01, gap + 0.01]}
        for share, level, gap in ((10, "coarse", -0.3), (10, "fine", -0.4), (25, "coarse", -0.1), (25, "fine", -0.2))
    ]
    said = headlines.papers_recipe({"rows": rows})
    assert said == ("-10.0 [-11.0, -9.0] and -20.0 [-21.0, -19.0] points after 25 % of the teacher's steps", 3)
    single = [
        row | {"row": f"{cosine_alone(100)}, {level}", "seeds": 1} for row, level in zip(rows, "cf", strict=False)
    ]
    assert headlines.papers_recipe({"rows": [*rows, *single]}) == said, "one seed makes no headline"
    alone = headlines.papers_recipe({"rows": single})
    assert alone.cell.endswith("after 100 % of the teacher's steps") and alone.seeds == 1
    assert headlines.papers_recipe({"rows": []}) is None


def test_the_margin_as_a_gate_is_counted_where_it_is_sure():
    def at(*leads):
        found = {str(n): {"difference": [gap, 0, 0], "p": p} for n, (gap, p) in enumerate(leads)}
        return {"leads": {"moved": found, "gained": {"0": {"difference": [0.1, 0, 0], "p": 1.0}}}}

    shares = [at((0.01, 0.01), (0.02, 0.2)), at((-0.01, 0.04), (0.03, 0.001))]
    said = headlines.margin_as_a_gate({"shares": shares, "seeds": {"a": 3, "b": 1}})
    assert said == (
        "shares refined: surely ahead in 2 of 4 comparisons, behind in 1; "
        "accuracy: surely ahead in 0 of 2 comparisons, behind in 0",
        1,
    )
    assert headlines.margin_as_a_gate({"shares": [], "seeds": {}}) is None


def test_a_line_says_how_many_seeds_are_behind_it():
    rows = [{"gmacs": 4.0}, {"gmacs": 1.0, "against_teacher": [0.004, -0.001, 0.009]}]
    said = headlines.coarse_on_fashion_mnist({"conditions": {"seeds": 2}, "rows": rows})
    assert said == ("+0.4 [-0.1, +0.9] points, 75.0 % saved", 2)


def test_mlips_line_is_the_verdict_on_its_claim():
    claim = {"rows": ["mlip", "clip"], "difference": [0.02, 0.01, 0.03], "verdict": "holds here", "seeds": 3}
    other = claim | {"rows": ["frequency", "clip"], "verdict": "not shown"}
    assert mlip_against_clip({"claims": [other, claim]}) == ("+2.0 [+1.0, +3.0] points: holds here", 3)
    assert mlip_against_clip({"claims": [other]}) is None


def test_mlips_saving_is_that_of_its_tower():
    rows = [
        {"method": name, "architecture": "ViT-B-16", "tower": {"gmacs": value}}
        for name, value in [("CLIP", 4), ("MLIP", 3)]
    ]
    assert saved_by_mlip({"rows": rows}) == ("25.0 %", None)


def composition(method, low, refined=0.1, seeds=3, p=0.01):
    known = {"method": method, "composed": True, "refined": refined, "seeds": seeds}
    return known | {"rival": {"difference": [0.02, low, 0.05], "p": p}}


def best(*rows):
    return best_composition({"rows": [{"composed": False, "method": "alone", "seeds": 3}, *rows]})


def test_the_best_composition_is_the_one_that_surely_gains_most():
    assert best(composition("M0", 0.0), composition("M1", 0.01)) == ("M1: +2.0 [+1.0, +5.0] points, best of 2", 3)
    assert best() is None


def test_a_composition_that_refines_nothing_is_in_no_headline():
    assert best(composition("idle", 0.02, refined=0.0), composition("M1", 0.01)).cell.endswith("best of 1")


def test_the_best_composition_has_the_seeds_that_its_rival_has_too():
    found = best(composition("M1", 0.01, seeds=2))
    assert found.cell.endswith("best of 1; too few seeds for a headline") and found.seeds == 2
    rival = {"composed": False, "method": "predictor", "seeds": 1}
    joined = composition("M1", 0.01)
    joined["rival"]["method"] = "predictor"
    assert best(rival, joined).seeds == 1


def test_a_gain_that_is_not_clear_is_not_shown():
    found = best(composition("M1", -0.01, p=0.3))
    assert found.cell == "no gain shown (M1: +2.0 [-1.0, +5.0] points, best of 1)"


def test_measured_speeds_stand_beside_the_counts():
    rows = [
        {"method": f"WaveCLIP {name}", "speed_ratio": {"1": one, "64": many}}
        for name, one, many in (("coarse-only", 1.1, 2.5), ("full", 0.5, 0.8))
    ]
    found = headlines.speed_of_waveclip({"embedded": {"rows": rows, "conditions": {"device": "CPU"}}})
    assert found == ("× 1.10 and × 0.50 at batch 1, × 2.50 and × 0.80 at 64 on CPU", None)


def test_commands_are_those_of_the_benchmarks():
    assert {line.command for line in LINES} <= {entry.command for entry in BENCHMARKS} | {"make speed"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_patch_rankings_lines_say_where_one_seed_is_all(seeds):
    result = {
        "conditions": {"keep": 0.6},
        "headline": {"all": [0.036, 0.028, 0.044], "seeds": seeds},
        "rivals": [
            {"rival": "class attention", "basis": basis, "task": task, "lead": [lead, 0.006, 0.013]}
            | {"seeds": seeds, "adjusted": 0.01}
            for basis, task, lead in (("equal keep", "shapes", 0.5), ("equal GMACs", "shapes", 0.009))
        ],
    }
    assert headlines.pruned_and_tuned(result) == ("+3.6 [+2.8, +4.4] points at keep 0.6", seeds)
    said = "one seed" if seeds == 1 else "better"
    found = headlines.ahead_of("class attention", result)
    assert found == (f"+0.9 [+0.6, +1.3] (shapes: {said}) points at equal GMACs", seeds)
    assert headlines.ahead_of("ToMe", result) is None
