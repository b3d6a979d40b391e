"""Times that are measured again: what stays as it was, and what is refused."""

from types import SimpleNamespace

import pytest

from benchmarks.together import deploy_costs
from benchmarks.together.deploy_costs import timed_again


@pytest.fixture
def costs(monkeypatch):
    """A stored table of one engine, whose models still have the weights "a"."""
    deployed = SimpleNamespace(first=None, model=SimpleNamespace(files={"weights": "a"}))
    case = SimpleNamespace(models={"dense": SimpleNamespace(deployed=deployed)}, work={})
    monkeypatch.setattr(deploy_costs, "named", lambda: None)
    monkeypatch.setattr(deploy_costs, "engines", lambda: ({"fp32": object(), "new": object()}, {}))
    monkeypatch.setattr(deploy_costs, "_makers", lambda given, smoke: {"shapes": lambda folder: case})
    monkeypatch.setattr(deploy_costs, "_forget", lambda cases: None)
    row = {"engine": "fp32", "side": "dense", "point": "", "threshold": 0.1, "accuracy": 0.7, "speed": {"1": "old"}}
    table = {"rows": [row], "groups": [["fp32"]], "weights": {"dense": {"weights": "a"}}, "timed": 8, "missing": {}}
    return {"missing": {}, "tables": {"shapes": table | {"conditions": {"date": "2026-01-01"}}, "other": {}}}


def test_accuracies_stay_and_times_are_new(costs, monkeypatch):
    def in_groups(case, found, groups, rows_of, timed, rounds):
        assert (list(found), groups, timed, rounds) == (["fp32"], [["fp32"]], 8, 11)
        return [row | {"speed": {"1": "new"}} for row in rows_of([("fp32", "dense")], None)], {}

    monkeypatch.setattr(deploy_costs, "_in_groups", in_groups)
    again = timed_again(costs, ["shapes"])
    (row,) = again["tables"]["shapes"]["rows"]
    assert row["accuracy"] == 0.7 and row["speed"] == {"1": "new"} and again["tables"]["other"] == {}
    assert again["tables"]["shapes"]["answered"] == {"date": "2026-01-01"}
    assert costs["tables"]["shapes"]["rows"][0]["speed"] == {"1": "old"}, "what was given is not changed"


def test_other_weights_and_unknown_tables_are_refused(costs):
    with pytest.raises(ValueError, match=r"TIMES: no table \['photos'\]; there are \['shapes', 'other'\]"):
        timed_again(costs, ["photos"])
    costs["tables"]["shapes"]["weights"] = {"dense": {"weights": "b"}}
    with pytest.raises(ValueError, match="TIMES: shapes was measured with other weights; leave TIMES out"):
        timed_again(costs, ["shapes"])
