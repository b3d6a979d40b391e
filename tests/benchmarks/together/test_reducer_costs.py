"""The costs of every reducer: each has a row or a reason, costs are those of the tower that was timed."""

import re

import pytest
import torch

from benchmarks.together import reducer_costs
from common.clip import CLIP
from common.flops import count_macs
from common.reducer_registry import installed_reducers
from common.reduction import ReducedTower
from patchrank.reducers import DivPrune


@pytest.fixture(scope="module")
def result():
    return reducer_costs.run(smoke=True)


def test_every_reducer_has_a_row_or_a_reason(result):
    whole, *rows = result["rows"]
    assert whole["reducer"] == reducer_costs.WHOLE
    assert {row["reducer"] for row in rows} | result["reasons"].keys() == set(installed_reducers())
    assert {"crossget", "dynamicvit"} <= {row["reducer"] for row in rows}  # with untrained modules, which cost the same
    tower, image = CLIP.tiny().image_tower, torch.zeros(1, 3, 32, 32)
    (row,) = (row for row in rows if row["reducer"] == "divprune")
    assert row["gmacs"] == count_macs(ReducedTower(tower, {0: DivPrune(0.6)}), image).gmacs
    for row in rows:
        assert row["batches"].keys() == {"1", "8"}
        assert all(speed["images_per_second"] > 0 and len(speed["faster"]) == 1 for speed in row["batches"].values())


def test_the_text_says_how_and_what_did_not_run(result):
    result = {**result, "reasons": {"a-name": "it needs a class token"}}
    rendered = reducer_costs.render(result)
    assert "| `divprune` |" in rendered["md"] and "| `a-name` | – | – |" in rendered["md"]
    assert "- `a-name` did not run: it needs a class token" in rendered["md"]
    assert "60 % of the patches from block 0 on" in rendered["md"]
    here = re.sub("[^a-z0-9]+", "-", result["conditions"]["device"].lower()).strip("-")
    assert list(rendered["figures"]) == [f"reducer-costs-{here}"]  # another machine's picture is another file
