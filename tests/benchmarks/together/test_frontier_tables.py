"""What the frontier's tables, picture and summary say of rows."""

import pytest

from benchmarks.together.compositions import DENSE
from benchmarks.together.frontier_figure import draw
from benchmarks.together.frontier_tables import reducers_on_test, rows_table, summary, verdict, verdicts
from benchmarks.waveclip.controls import CASCADE, HALF, TRAINED_ON, WAVE

JOINED = f"{WAVE} + ToMe"


def row(method, accuracy=0.7, gmacs=0.01, **changes):
    known = {"method": method, "composed": " + " in method, "seeds": 3, "keep": None, "refined": 0.1, "gmacs": gmacs}
    known |= {"accuracy": accuracy, "interval": [accuracy - 0.01, accuracy + 0.01], "val": {"accuracy": accuracy}}
    return known | {"rival": None, "seconds": gmacs / 10, "dominated": []} | changes


def rival(method, middle, p):
    return {"method": method, "keep": None, "difference": [middle, middle - 0.01, middle + 0.01], "p": p}


def result(*changed, missing=None):
    rows = {DENSE: row(DENSE, 0.75, 0.03), WAVE: row(WAVE), HALF: row(HALF), CASCADE: row(CASCADE)}
    rows |= {TRAINED_ON: row(TRAINED_ON, 0.76, 0.03), JOINED: row(JOINED, rival=rival(WAVE, 0.0, 1.0))}
    pictures = {"val": 2000, "test": 4000}
    return {
        "pictures": pictures,
        "rows": list((rows | {each["method"]: each for each in changed}).values()),
        "missing": missing or {},
    }


@pytest.mark.parametrize(("middle", "p", "expected"), [(0.02, 0.04, 1), (0.02, 0.06, 0), (-0.02, 0.04, -1)])
def test_a_difference_is_called_one_below_an_adjusted_p_of_five_per_cent(middle, p, expected):
    assert verdict(row(JOINED, rival=rival(WAVE, middle, p))) == expected


def test_a_composition_pays_where_it_is_clearly_above():
    above = row(JOINED, rival=rival(WAVE, 0.02, 0.01), dominated=["seconds"])
    (said,) = verdicts([row(WAVE), above])
    assert said.startswith(f"**{JOINED} pays** in multiply-adds: it is clearly above ") and "at 1 of 1 " in said
    assert "on the frontier at 0 of them" in said


def test_a_composition_of_one_seed_says_so():
    (said,) = verdicts([row(JOINED, seeds=1, rival=rival(WAVE, -0.02, 0.01))])
    assert said.startswith(f"**{JOINED}** has one training seed, which makes no headline.")
    assert "costs no more at 0 of 1 operating points, and clearly below it at 1." in said


def test_a_composition_that_refines_nothing_is_no_composition():
    assert verdicts([row(JOINED, refined=0.0, rival=rival(WAVE, 0.0, 1.0))]) == []


def test_a_row_says_how_many_seeds_it_has():
    dense = row(DENSE, seeds=1)
    lines = rows_table([dense, row(WAVE)], dense).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["one seed", "3"]


def test_the_summary_names_all_controls_and_the_rival():
    said = summary(result(row(WAVE, rival=rival(HALF, -0.02, 0.01))))
    controls = (
        "the half-resolution CLIP 70.0 [69.0, 71.0] % at 33 % of its multiply-adds, the cascade of two CLIPs 70.0"
    )
    assert said.startswith("On 4,000 pictures of test the dense teacher names 75.0 ")
    assert f"Its controls: {controls}" in said and "the teacher trained on 76.0" in said and "not measured" not in said
    assert f"WaveCLIP is clearly below the best other method alone that costs no more, the {HALF}: -2.0" in said
    assert "Of 1 compositions, none is clearly above" in said and "no headline" not in said


def test_the_summary_names_a_composition_that_is_clearly_better():
    assert f"compositions, {JOINED} is clearly above" in summary(result(row(JOINED, rival=rival(WAVE, 0.02, 0.01))))


def test_a_control_of_two_seeds_makes_no_headline():
    assert "2 training seeds: no headline is drawn" in summary(result(row(CASCADE, seeds=2)))


def test_the_summary_says_what_trains_a_missing_control():
    lacking = result(missing={TRAINED_ON: "make it"})
    lacking["rows"] = [each for each in lacking["rows"] if each["method"] != TRAINED_ON]
    assert f"Controls not measured yet: the {TRAINED_ON} (`make it`)." in summary(lacking)


def test_the_picture_shows_waveclip_above_all_and_no_composition_that_refines_nothing():
    figure = draw(result(row(JOINED, refined=0.0))["rows"])
    for axes in figure.axes:
        drawn = {line.get_label(): line.get_zorder() for line in axes.lines if not line.get_label().startswith("_")}
        assert set(drawn) == {DENSE, WAVE, HALF, CASCADE, TRAINED_ON} and max(drawn, key=drawn.get) == WAVE
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts][:2] == [WAVE, DENSE]


def test_reducers_on_test_stand_by_budget_with_the_best_on_val_first():
    """Of two keep rates of ToMe within 80 % the better one on val stands; ATC is better on val and not on test."""
    rows = [row(DENSE, 0.75, 0.03)]
    settings = {("ToMe", 0.4): (0.6, 0.02), ("ToMe", 0.6): (0.7, 0.022), ("ATC", 0.5): (0.72, 0.023)}
    for (name, keep), (val, gmacs) in settings.items():
        rows.append(row(f"teacher + {name}", 0.71, gmacs, composed=False, keep=keep, val={"accuracy": val}, best=None))
    rows[2]["best"] = rival("teacher + ATC", -0.02, 0.01)
    said = reducers_on_test({"rows": rows, "budgets": [0.6, 0.8, 1.0], "pictures": {"val": 2000, "test": 4000}})
    lines = [line for line in said.splitlines() if line.startswith("| 80 %")]
    assert [line.split(" | ")[1:4] for line in lines] == [["ATC", "50 %", "77 %"], ["ToMe", "60 %", "73 %"]]
    assert (
        lines[1].endswith("| -2.0 [-3.0, -1.0] behind |") and "60 % |" not in said.split("80 %")[0].split("GMACs")[-1]
    )
    rows[2]["best"] = None
    assert "nothing is compared: `make reproduce-frontier`" in reducers_on_test(
        {"rows": rows, "budgets": [0.8], "pictures": {"val": 1, "test": 1}}
    )
