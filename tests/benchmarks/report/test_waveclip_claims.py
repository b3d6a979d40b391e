"""The verdicts on WAVECLIP's claims follow from the stored results, whichever way they fall."""

import pytest

from benchmarks.report import waveclip_claims
from benchmarks.report.waveclip_claims import CLAIMS, verdicts


@pytest.fixture
def stored(monkeypatch):
    """Results by name, in place of those that are stored."""
    results = {}
    monkeypatch.setattr(waveclip_claims, "_stored", results.get)
    return results


def test_every_claim_has_a_line_with_what_is_measured_and_a_verdict():
    lines = verdicts().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {claim.said}" for claim in CLAIMS]
    assert all(line.count(" | ") == 2 for line in lines)


def refining(**gains):
    return {"refining": [{"data": data, "gain": gain, "p": p} for data, (gain, p) in gains.items()]}


def test_a_verdict_names_the_sets_it_is_for(stored):
    stored["waveclip-gates"] = refining(
        stars=((0.02, 0.01, 0.03), 0.001), moons=((-0.02, -0.03, -0.01), 0.001), suns=((0.01, -0.01, 0.03), 0.4)
    )
    _, verdict = waveclip_claims.refining_wins_accuracy()
    assert verdict == "shown: stars; the coarse level is better: moons; not shown: suns"


@pytest.mark.parametrize(("p", "words"), [(0.2, "not refuted at every length"), (0.001, "not on scenes of shape")])
def test_a_short_distillation_fails_where_the_loss_is_sure(stored, p, words):
    lost = {"difference": (-0.1, -0.12, -0.08), "p": p}
    rows = [
        {"row": f"cosine distance alone, 10 % of the teacher's steps, {level}"} | lost for level in ("coarse", "fine")
    ]
    stored["waveclip-shapes"] = {"rows": rows}
    measured, verdict = waveclip_claims.short_distillation_keeps_the_teacher()
    assert "10 %: -10.0 [-12.0, -8.0] and -10.0 [-12.0, -8.0]" in measured and verdict.startswith(words)


def test_a_lead_of_the_margin_is_counted_by_p(stored):
    lead = (0.002, 0.001, 0.003)
    rows = [{"what": f"accuracy, {share} % refined", "lead": lead, "p": p} for share, p in ((15, 0.01), (50, 0.3))]
    stored["waveclip-fig4"] = {"rows": rows}
    assert waveclip_claims.margin_is_the_better_gate()[1] == "in 1 of 2 comparisons, by 0.2 at most"


def test_a_result_that_is_not_there_leaves_its_claim_open(stored):
    for judge in (waveclip_claims.cache_is_cheaper, waveclip_claims.margin_is_more_stable):
        assert judge() == ("not run", "open")
