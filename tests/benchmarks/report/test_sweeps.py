"""Which reducer the sweeps pick, and how the others differ from it at equal multiply-adds."""

import json
import re

import pytest
import torch

from benchmarks import RESULTS, ROOT
from benchmarks.equal_cost import At, Sweep, at_share, between, gap_in_words, sweep
from benchmarks.patchrank.comparisons import EQUAL_COST, verdict
from benchmarks.patchrank.trained_rivals import DROPPING as DROPPING_TRAINED
from benchmarks.patchrank.trained_rivals import MERGING
from benchmarks.report import sweeps
from benchmarks.report.sweeps import DROPPING, SWEEPS, Choice, at_equal_cost, choices, picks
from benchmarks.statistics import Interval, difference


def at(keep, *right):
    return At(keep, torch.tensor([right], dtype=torch.float32))


def test_answers_lie_on_the_line_between_two_costs():
    fewer, more = torch.tensor([[True, False]]), torch.tensor([[False, False]])
    assert between(2.5, (2.0, fewer), (4.0, more)).tolist() == [[0.75, 0.0]]


def test_a_reducer_at_a_share_lies_between_its_two_neighbours_in_cost():
    measured = {0.9: at(0.9, 1, 1), 0.5: at(0.3, 0, 0), 0.7: at(0.7, 1, 0)}
    found = at_share(measured, 0.6)
    assert found.keep == pytest.approx(0.5) and found.right[0].tolist() == pytest.approx([0.5, 0.0])
    assert at_share(measured, 0.7).right.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("share", [0.4, 0.95])
def test_nothing_is_said_beyond_what_was_measured(share):
    assert at_share({0.9: at(0.9, 1), 0.5: at(0.5, 0)}, share) is None


def test_a_committed_sweep_holds_the_answers_that_its_table_counts():
    (row,) = (
        row
        for row in json.loads((RESULTS / "sweeps" / "shapes" / "sweep.json").read_text())["rows"]
        if (row["reducer"], row["keep"]) == ("tome", 0.7)
    )
    assert sweep("shapes").measured["tome"][row["of_whole"]].right.double().mean() == pytest.approx(row["top1"])


@pytest.fixture
def drawn(monkeypatch):
    """Sweeps on 2,000 pictures: "atc" names most on the first photographs alone; "tome" costs so little on all."""
    draw = torch.Generator().manual_seed(0)

    def right(share):
        return (torch.rand(1, 2000, generator=draw) < share).float()

    def made(**shares):
        lines = {name: {0.5: At(0.3, right(share)), 1.0: At(0.9, right(share))} for name, share in shares.items()}
        return Sweep(right(0.9), lines)

    known = {
        "shapes": made(tome=0.8, kmedoids=0.6, divprune=0.6, random=0.85),
        "cifar10": made(atc=0.9, tome=0.8, kmedoids=0.5, random=0.85),
        "fashion-mnist": made(tome=0.7, kmedoids=0.85, random=0.5),
    }
    monkeypatch.setattr(sweeps, "sweep", known.get)
    return known


def test_a_pick_is_the_best_on_val_of_what_costs_so_little_on_all_sets_of_its_kind_and_no_control(drawn):
    found = {key: choice.pick for key, choice in choices().items()}
    assert found["shapes", 0.75, False] == "tome"
    assert found["cifar10", 0.75, False] == found["fashion-mnist", 0.75, False] == "tome", "no atc on Fashion-MNIST"
    assert found["cifar10", 0.6, False] == "atc" and ("fashion-mnist", 0.6, False) not in found
    assert found["cifar10", 0.75, True] == found["fashion-mnist", 0.75, True] == "kmedoids"


def test_the_others_differ_from_the_pick_picture_by_picture(drawn):
    choice, known = choices()["fashion-mnist", 0.75, False], drawn["fashion-mnist"]
    ours, theirs = (known.at(name, 0.75).right for name in ("tome", "kmedoids"))
    assert choice.gaps["kmedoids"] == difference(theirs, ours)
    assert choice.word("kmedoids") == "ahead" and choice.word("random") == "behind"


def test_a_difference_is_called_one_below_an_adjusted_p_of_five_per_cent():
    gaps = {name: Interval(middle, 0, 0, 1) for name, middle in (("a", -0.1), ("b", -0.05), ("c", 0.01))}
    choice = Choice("d", at(0.5, 1), gaps["c"], gaps, {"a": 0.01, "b": 0.06, "c": 0.04})
    assert [choice.word(name) for name in gaps] == ["behind", "not shown", "ahead"] and choice.level() == ["c", "b"]


def test_the_committed_sweeps_fill_the_table_with_the_best_reducer_first():
    head, _, pick, *lines = [line for line in at_equal_cost().splitlines() if line.startswith("|")]
    assert head.startswith("| reducer, less the pick | scenes of shape, 75 % of GMACs | CIFAR-10, 75 % of GMACs |")
    assert pick.startswith("| **the pick**, less the whole tower | ") and "–" not in pick
    at_75 = [[cell.split()[0] for cell in line.split("|")[2:5] if cell.strip() != "–"] for line in lines]
    means = [sum(0 if cell == "**pick**" else float(cell) for cell in found) / len(found) for found in at_75 if found]
    assert means == pytest.approx(sorted(means, reverse=True), abs=0.11) and len(lines) > 20  # cells are rounded


def answers():
    """The committed answers, by question and data set."""
    head, _, *lines = (line.strip("| ").split(" | ") for line in picks().splitlines() if line.startswith("|"))
    assert head[1:] == list(SWEEPS.values())
    return {line[0]: dict(zip(SWEEPS, line[1:], strict=True)) for line in lines}


def test_what_flatters_token_correlation_stands_beside_it():
    caveat = "its cosine was chosen on these pictures"
    dropping = answers()["for three quarters, where tokens can only be dropped?"]
    assert dropping["shapes"].startswith(f"**token correlation** ({caveat}), keep ")
    assert f"| token correlation ({caveat} of scenes of shape) |" in at_equal_cost()


def test_how_one_reducer_lies_from_another_is_said_with_its_interval():
    said = gap_in_words("class-attention-after", "class-attention", 0.75)
    assert re.fullmatch(r"\S+ \[\S+ \S+\] points on scenes of shape and \S+ \[\S+ \S+\] points on CIFAR-10", said)


def test_what_the_page_says_of_picks_is_what_the_sweeps_show():
    found, page = choices(), (ROOT / "docs" / "which-reducer.md").read_text()
    assert "Every pick among all reducers keeps something of each patch" in page
    assert not {choice.pick for (*_, dropping), choice in found.items() if not dropping} & {*DROPPING}
    assert "DiffRate's place on\n  scenes of shape does not carry over" in page
    assert (
        found["shapes", 0.75, False].pick == "diffrate" and found["cifar10", 0.75, False].word("diffrate") == "behind"
    )
    assert "ATC is nowhere shown to be behind" in page
    everywhere = [choice for (*_, dropping), choice in found.items() if not dropping]
    assert all(choice.pick == "atc" or choice.word("atc") != "behind" for choice in everywhere)
    assert "not shown to beat random places of each picture" in page
    assert found["cifar10", 0.75, True].word("random-per-picture") == "not shown"


def test_what_the_page_says_of_training_is_what_patch_rankings_table_shows():
    page, stored = (ROOT / "docs" / "which-reducer.md").read_text(), RESULTS / "patchrank-table1.json"
    measured = json.loads(stored.read_text())
    words = [verdict(row) for row in measured["rivals"] if (row["rival"], row["basis"]) == ("ToMe", EQUAL_COST)]
    assert "behind ToMe, untrained, on two of three tasks, and not told from it" in page
    assert sorted(words) == ["not shown", "worse", "worse"]
    learned = {(row["of"], row["task"]): verdict(row) for row in measured["learned"]}
    assert "Training hardly adds to merging" in page and "DynamicViT's modules are not shown to add to it" in page
    merging = [word for (of, _), word in learned.items() if of in ("CrossGET", MERGING)]
    assert set(merging) == {"not shown"} and learned["DynamicViT", "shapes"] == "not shown"
    assert learned[DROPPING_TRAINED, "shapes"] == "better"
