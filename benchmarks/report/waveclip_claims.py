"""docs/waveclip.md's list of verdicts: what WAVECLIP claims, what is measured of it here, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks import RESULTS, registry
from benchmarks.cells import Result, accuracy, points, table
from benchmarks.training.shapes import COSINE_SHARES
from benchmarks.waveclip import controls
from benchmarks.waveclip.controls import HALF, SAVES, WAVE
from benchmarks.waveclip.shapes import cosine_alone

SURE = 0.05
"""The p below which a difference is shown."""
SETS = {"scenes of shape": "waveclip-shapes", "CIFAR-10": "photos-cifar10", "Fashion-MNIST": "fashion-mnist"}
"""The results with WaveCLIP's savings, by data set."""
ROWS = {**SETS, "scenes of shape": "table2"}
"""The results with WaveCLIP's levels as rows beside their controls."""


class Claim(NamedTuple):
    """A claim of the paper, and a function of what is stored: what is measured, and the verdict."""

    said: str
    judge: Callable[[], tuple[str, str]]


def _stored(name: str) -> Result | None:
    result = next(iter(registry.results(name, RESULTS)), None)
    return result["embedded"] if result and name == "table2" else result


def _of_sets(names: Mapping[str, str]) -> dict[str, Result]:
    """The results that are there, by data set."""
    known = {data: _stored(name) for data, name in names.items()}
    return {data: result for data, result in known.items() if result}


def _grouped(words: Mapping[str, str]) -> str:
    """One verdict of the words said of each data set."""
    said = dict.fromkeys(words.values())
    return "; ".join(f"{word}: {', '.join(data for data in words if words[data] == word)}" for word in said)


def _by_set(cells: Mapping[str, str]) -> str:
    return "; ".join(f"{data}: {cell}" for data, cell in cells.items())


def saved_at_the_teachers_accuracy() -> tuple[str, str]:
    """Multiply-adds saved by the margin gate where val finds no loss beyond the protocol's allowance."""
    lines = {data: _lines(result) for data, result in _of_sets(SETS).items()}
    shown = {data: controls.verdict(line[WAVE]) == SAVES for data, line in lines.items() if WAVE in line}
    cells = {
        data: controls.saved_share(lines[data][WAVE]) if saves else controls.verdict(lines[data][WAVE])
        for data, saves in shown.items()
    }
    return _by_set(cells), _grouped({data: "shown" if saves else "no saving shown" for data, saves in shown.items()})


def more_than_its_controls_save() -> tuple[str, str]:
    """WaveCLIP's saving less that of a cascade of two CLIPs, which needs neither wavelets nor a shared cache."""
    lines = {data: list(_lines(result).values()) for data, result in _of_sets(SETS).items()}
    lines = {data: some for data, some in lines.items() if some}
    cells = {data: controls.beyond_cascade(some) for data, some in lines.items()}
    words = {}
    for data, some in lines.items():
        more = next(line for line in some if "chosen" not in line)["saved"]
        leads = cells[data] != controls.NOT_COMPARABLE and more[1] > 0
        words[data] = "shown beside a cascade" if leads else "no lead over a cascade shown"
    return _by_set(cells), _grouped(words)


def _lines(result: Result) -> dict[str, dict[str, Any]]:
    return {line["method"]: line for line in result.get("savings", ()) if line["reference"] == "teacher"}


def refining_wins_accuracy() -> tuple[str, str]:
    """The fine level's accuracy less the coarse one's, on the same pictures."""
    rows = (_stored("waveclip-gates") or {}).get("refining", ())
    if not rows:
        return "not run", "open"
    words = {}
    for row in rows:
        better = "shown" if row["gain"][0] > 0 else "the coarse level is better"
        words[row["data"]] = better if row["p"] < SURE else "not shown"
    cells = {row["data"]: points(row["gain"]) for row in rows}
    return f"fine level less coarse, points: {_by_set(cells)}", _grouped(words)


def coarse_beats_a_plain_small_model() -> tuple[str, str]:
    """The coarse level and a half-resolution CLIP of the same cost, each against the teacher."""
    cells, words = {}, {}
    for data, rows in _rows().items():
        coarse, half = rows[f"{WAVE} coarse-only"], rows[HALF]
        both = (accuracy(row["accuracy"], row["interval"]) for row in (coarse, half))
        cells[data] = " and ".join(both)
        words[data] = "shown" if coarse["interval"][0] > half["interval"][1] else "not shown"
    return f"coarse level and half-resolution CLIP, %: {_by_set(cells)}", _grouped(words)


def _rows() -> dict[str, dict[str, dict[str, Any]]]:
    return {data: {row["method"]: row for row in result["rows"]} for data, result in _of_sets(ROWS).items()}


def short_distillation_keeps_the_teacher() -> tuple[str, str]:
    """What the paper's recipe loses to the teacher, by its length."""
    result, said, lost = _stored("waveclip-shapes"), [], True
    for share in COSINE_SHARES:
        rows = [row for row in (result or {"rows": ()})["rows"] if row["row"].startswith(cosine_alone(share))]
        rows = [row for row in rows if "difference" in row]
        if rows:
            said.append(f"{share} %: {' and '.join(points(row['difference']) for row in rows)}")
            lost &= all(row["p"] < SURE and row["difference"][1] < 0 for row in rows)
    if not said:
        return "not run", "open"
    verdict = "not on scenes of shape: every length surely loses accuracy" if lost else "not refuted at every length"
    return f"coarse and fine level less the teacher, by length in the teacher's steps: {'; '.join(said)}", verdict


def cache_is_cheaper() -> tuple[str, str]:
    """What a refined picture costs by encoding anew, beside the cached pass, at ViT-B/16's size."""
    if not (result := _stored("waveclip-fig3")):
        return "not run", "open"
    model = next(iter(result["models"].values()))
    counted = model["naive_gmacs"] / model["cached_gmacs"] - 1
    timed = model["naive_seconds"] / model["cached_seconds"] - 1
    off = [point["overhead"] / point["printed"] - 1 for point in result["points"]]
    measured = (
        f"a refined picture of ViT-B/16 costs {100 * counted:.0f} % more multiply-adds without the cache, and "
        f"{100 * timed:.0f} % more time on {result['conditions']['device']}"
    )
    return measured, f"it holds; the printed extra costs lie {100 * min(off):.0f} to {100 * max(off):.0f} % below ours"


def margin_is_more_stable() -> tuple[str, str]:
    """The margin's lead over the maximum probability as one threshold for several sets."""
    if not (result := _stored("waveclip-gates")):
        return "not run", "open"
    leads = [at["leads"]["moved"]["maximum probability"] for at in result["shares"]]
    sure = sum(lead["p"] < SURE and lead["difference"][1] > 0 for lead in leads)
    said = ", ".join(f"{100 * lead['difference'][0]:.1f}" for lead in leads)
    measured = f"points of pictures that the maximum probability refines otherwise beyond the margin: {said}"
    return measured, f"it holds at {sure} of {len(leads)} shares on {', '.join(SETS)}; accuracy hardly notices"


def margin_is_the_better_gate() -> tuple[str, str]:
    """The margin's lead in accuracy at equal shares of one data set."""
    if not (result := _stored("waveclip-fig4")):
        return "not run", "open"
    rows = [row for row in result["rows"] if row["what"].startswith("accuracy")]
    sure = [row for row in rows if row["p"] < SURE and row["lead"][1] > 0]
    said = "; ".join(f"{row['what'].removeprefix('accuracy, ')}: {points(row['lead'], decimals=2)}" for row in rows)
    if not sure:
        return f"points of accuracy: {said}", "not shown"
    greatest = max(row["lead"][0] for row in sure)
    return f"points of accuracy: {said}", f"in {len(sure)} of {len(rows)} comparisons, by {100 * greatest:.1f} at most"


def costs_are_as_printed() -> tuple[str, str]:
    """The printed multiply-adds of WAVECLIP's rows beside the counted ones, and the saving counted alike."""
    if not (result := next(iter(registry.results("table2", RESULTS)), None)):
        return "not run", "open"
    block = result["paper_scale"]
    off = max(abs(row["difference"]) for row in block["rows"] if row["method"].startswith("WAVECLIP"))
    stated, alike = block["savings"]["stated"], block["savings"]["gmacs"]
    measured = (
        f"WAVECLIP's rows lie within {off:.1f} % of the count with attention products, its dense row fits only without "
        f"them; counted alike, WAVECLIP-high saves {alike:.1f} % where {stated:.1f} are stated"
    )
    return measured, "they hold; the printed table mixes two accounts, to its own disadvantage"


CLAIMS = (
    Claim("early exit saves multiply-adds at the teacher's accuracy", saved_at_the_teachers_accuracy),
    Claim("wavelets and the shared cache are what saves", more_than_its_controls_save),
    Claim("the finer level is the more accurate", refining_wins_accuracy),
    Claim("the coarse level is worth more than a small model", coarse_beats_a_plain_small_model),
    Claim("a short distillation by cosine distance is enough", short_distillation_keeps_the_teacher),
    Claim("the cache makes refining cheaper, by up to 20 %", cache_is_cheaper),
    Claim("one threshold of the margin serves several data sets better", margin_is_more_stable),
    Claim("the margin separates better than the maximum probability", margin_is_the_better_gate),
    Claim("multiply-adds of Table 2", costs_are_as_printed),
)
"""The second and fourth are implied: the paper has no such control."""


def verdicts(claims: Iterable[Claim] = CLAIMS) -> str:
    """The claims with what is measured of them and the verdicts, as a Markdown table."""
    head = ["the paper's claim", "measured here", "verdict"]
    return table(head, [[claim.said, *claim.judge()] for claim in claims], left=(0, 1, 2)) + "\n"
