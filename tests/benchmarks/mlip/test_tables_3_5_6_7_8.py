"""MLIP's Tables 3, 5, 6, 7 and 8: rows of the trainings from scratch beside the paper's, from drawn answers."""

import json

import pytest

from benchmarks.mlip import shapes
from benchmarks.mlip.shapes_runs import BY_NAME
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from benchmarks.statistics import difference, mean_interval
from tests.benchmarks.mlip.test_shapes import drawn

TABLES = ("3", "5", "6", "7", "8")


@pytest.fixture
def rendered(monkeypatch, tmp_path):
    """The Markdown of a table of these runs; all other rows have none."""

    def render(number, **known):
        monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
        monkeypatch.setattr(shapes, "known", lambda _: {name.replace("_", "-"): runs for name, runs in known.items()})
        table = benchmark(f"mlip-table{number}").load()
        return table.render(json.loads(json.dumps(table.run(smoke=True))))["md"]

    return render


def of_test(runs):
    return [answers["test"] for _, answers in runs]


def test_a_row_shows_the_papers_numbers_and_ours_with_intervals(rendered):
    clip = drawn(0.3)
    text = rendered("6", clip=clip)
    middle, low, high = (100 * value for value in mean_interval(of_test(clip), 20).ends)
    cell = f"{middle:.1f} [{low:.1f}, {high:.1f}]"
    assert f"| CLIP | 10.4 | 6.6 | 16.3 | 3 | {cell} | {cell} | {cell} | {cell} | 0.0300 |" in text
    assert "points [95 %]" not in text, "there is no other row"


def test_differences_are_paired_by_seed_and_picture(rendered):
    clip, frequency = drawn(0.3), drawn(0.35)
    text = rendered("6", clip=clip, frequency=frequency)
    gain = difference(of_test(frequency), of_test(clip), paired_seeds=True, resamples=20)
    middle, low, high = (100 * value for value in gain.ends)
    assert f"| + frequency transform | {middle:+.1f} [{low:+.1f}, {high:+.1f}] |" in text
    assert "| against CLIP, points [95 %] |" in text


def test_seeds_that_the_reference_lacks_count_in_no_difference(rendered):
    text = rendered("8", mlip=drawn(0.5, seeds=1), no_guide=drawn(0.4, seeds=3))
    one = 100 * (of_test(drawn(0.4))[0].mean() - of_test(drawn(0.5))[0].mean())
    assert f"| MLIP without Guide | {one:+.1f} [" in text
    assert "3 of 3 runs are missing: CLIP; SLIP; DeCLIP without" in text and "2 of 3 runs are missing: MLIP." in text


@pytest.mark.parametrize("table", TABLES)
def test_every_table_can_be_made_before_anything_is_run(table, rendered):
    text = rendered(table)
    for row in paper_numbers("mlip")[f"table{table}"]:
        assert (f"| {row['method']} |" in text) == ("run" in row)
        at_paper_scale = f"| {row.get('title', row['method'])}, paper |"
        assert (at_paper_scale in text) == (at_paper_scale.replace("paper", "ours") in text) == ("model" in row)
    assert "| not run | not run |" in text and "`python -m benchmarks mlip-shapes-runs` trains them" in text


def test_table_5_states_the_coefficients_that_the_paper_does_not(rendered):
    assert "smoothing 0.1;" in rendered("5") and "0.325, in a queue of 16 batches" in rendered("5")


def test_every_row_of_the_tables_is_trained():
    rows = [row["run"] for number in TABLES for row in paper_numbers("mlip")[f"table{number}"] if "run" in row]
    shown_elsewhere = {name for name in BY_NAME if name.startswith("texture")}
    assert set(rows) | shown_elsewhere == set(BY_NAME)
