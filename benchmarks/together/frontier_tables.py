"""The frontier's table, what is said of it, and its notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cells import Result, accuracy, points, table
from benchmarks.patchrank.methods import remark
from benchmarks.together.compositions import DENSE, RANKED
from benchmarks.together.embedded_reference import sentence
from benchmarks.together.frontier_figure import CONTROLS, draw
from benchmarks.waveclip.controls import HEADLINE_SEEDS, WAVE, counted, no_headline

SIGNIFICANT = 0.05
"""Below this p, after Holm's correction, a difference is called one."""
TRAIN_ENOUGH = "`make retrain ONLY='shapes-*'`"
Row = dict[str, Any]


def render(result: Result) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    rows = result["rows"]
    # A result of before all reducers were measured has named rows alone.
    by_name = {named: [row for row in rows if row.get("named", True) == named] for named in (True, False)}
    blocks = [rows_table(by_name[True], rows[0]), *verdicts(rows)]
    blocks += [f"{name}: not run; `{command}`." for name, command in result["missing"].items()]
    blocks.append(sentence())
    blocks.append(_note(result))
    if by_name[False]:
        summary = "The other reducers alone: none is the best on val within a budget"
        blocks += [f"<details><summary>{summary}</summary>", rows_table(by_name[False], rows[0]), "</details>"]
    return {"md": "\n\n".join(blocks) + "\n", "figures": {"frontier": draw(rows)}}


def rows_table(results: Sequence[Row], dense: Row) -> str:
    """Rows of ``measure`` as a Markdown table. dense: the dense teacher's, whose costs theirs are compared with."""
    head = ["method", "seeds", "keep", "refined", "GMACs", "of dense", "accuracy [95 %]"]
    head += ["against the best alone, no dearer", "against the best reducer within its budget", "ms a picture"]
    head += ["dominated in"]
    rows = []
    for row in results:
        rows.append(
            [
                row["method"],
                "one seed" if row["seeds"] == 1 else row["seeds"],
                _share(row["keep"]),
                _share(row["refined"]),
                f"{row['gmacs']:.4f}",
                f"{100 * row['gmacs'] / dense['gmacs']:.0f} %",
                accuracy(row["accuracy"], row["interval"]),
                _against(row["rival"]),
                _against(row.get("best")),
                f"{1000 * row['seconds']:.3f} (×{dense['seconds'] / row['seconds']:.2f})",
                ", ".join({"gmacs": "GMACs", "seconds": "time"}[cost] for cost in row["dominated"]) or "–",
            ]
        )
    return table(head, rows, left=(0, 7, 8, 10))


def compared(rows: Sequence[Row]) -> bool:
    """Whether reducers are compared with the best one within their budget."""
    return any(row.get("best") for row in rows)


def reducers_on_test(result: Result) -> str:
    """The best reducers on val within each budget, four a budget, with their accuracy on test."""
    rows, lines = result["rows"], []
    alone = [row for row in rows if row["keep"] is not None and not row["composed"] and row["method"] != RANKED]
    for share in (share for share in result["budgets"] if share < 1):
        best: dict[str, Row] = {}
        for row in (row for row in alone if row["gmacs"] <= share * rows[0]["gmacs"] * (1 + 1e-9)):
            best[row["method"]] = max(best.get(row["method"], row), row, key=lambda row: row["val"]["accuracy"])
        ranked = sorted(best.values(), key=lambda row: row["val"]["accuracy"], reverse=True)
        for row in ranked[:4]:
            cost = f"{100 * row['gmacs'] / rows[0]['gmacs']:.0f} %"
            cells = [row["method"].removeprefix("teacher + "), _share(row["keep"]), cost]
            found = row.get("best")
            word = {1: "ahead", 0: "not shown", -1: "behind"}[_sign(found)] if found else ""
            gap = f"{points(found['difference'])} {word}" if found else "–"
            lines.append([f"{100 * share:.0f} %", *cells, accuracy(row["accuracy"], row["interval"]), gap])
    head = ["within", "best on val", "keep", "of the GMACs", "test, %", "less the best on val"]
    note = (
        f"Scenes of shape: chosen on the first {result['pictures']['val']:,} pictures of val, read on the first "
        f"{result['pictures']['test']:,} of test; four reducers a budget, the best on val first. The whole tower names "
        f"{accuracy(rows[0]['accuracy'], rows[0]['interval'])} %. "
    )
    if compared(rows):
        note += "Behind, ahead: p below .05 after Holm's correction over all comparisons of the frontier."
    else:
        note += "Keep rates are of a grid, and nothing is compared: `make reproduce-frontier` does both anew."
    return f"{table(head, lines, left=(0, 1))}\n\n{note} [All of them](../benchmarks/results/frontier.md).\n"


def composed(rows: Sequence[Row]) -> list[Row]:
    """The rows of compositions. One that refines no picture is WaveCLIP itself and no composition."""
    return [row for row in rows if row["composed"] and row["refined"]]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _against(rival: Row | None) -> str:
    if rival is None:
        return "–"
    keep = "" if rival["keep"] is None else f", {_share(rival['keep'])}"
    return f"{points(rival['difference'])} ({rival['method']}{keep})"


def verdict(row: Row) -> int:
    """1 where a row is clearly above its rival, -1 where it is clearly below, else 0."""
    return _sign(row["rival"])


def _sign(rival: Row) -> int:
    difference, p = rival["difference"][0], rival["p"]
    return 0 if p >= SIGNIFICANT else 1 if difference > 0 else -1


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One line a composition: whether it pays in multiply-adds, by paired intervals, and in measured time."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in composed(rows)):
        own = [row for row in composed(rows) if row["method"] == name]
        above, below = (sum(verdict(row) == sign for row in own) for sign in (1, -1))
        quick = sum("seconds" not in row["dominated"] for row in own)
        begin = f"**{name} {'pays' if above else 'does not pay'}** in multiply-adds: it"
        if own[0]["seeds"] < HEADLINE_SEEDS:
            begin = f"**{name}** has {counted(own[0]['seeds'])}, which makes no headline. In multiply-adds it"
        lines.append(
            f"{begin} is clearly above the best method alone that costs no more at {above} of {len(own)} operating "
            f"points, and clearly below it at {below}. "
            f"In measured time it is on the frontier at {quick} of them: no other row is as accurate and no slower."
        )
    return lines


def summary(result: Result) -> str:
    """What the frontier shows of WaveCLIP, its controls and its compositions, in a paragraph for README."""
    best: dict[str, Row] = {}
    for row in result["rows"]:
        best[row["method"]] = max(best.get(row["method"], row), row, key=lambda row: row["val"]["accuracy"])
    dense, wave = best[DENSE], best[WAVE]
    said = [
        f"On {result['pictures']['test']:,} pictures of test the dense teacher names {_named(dense)}, WaveCLIP "
        f"{_named(wave)} at {_cost(wave, dense)}."
    ]
    measured = [f"the {name} {_named(best[name])} at {_cost(best[name], dense)}" for name in CONTROLS if name in best]
    said += [f"Its controls: {', '.join(measured)}."] if measured else []
    commands = {name: result["missing"].get(name, "make reproduce-frontier") for name in CONTROLS if name not in best}
    lacking = [f"the {name} (`{command}`)" for name, command in commands.items()]
    said += [f"Controls not measured yet: {', '.join(lacking)}."] if lacking else []
    if wave["rival"]:
        against = {1: "clearly above", 0: "not clearly apart from", -1: "clearly below"}[verdict(wave)]
        said.append(
            f"WaveCLIP is {against} the best other method alone that costs no more, the {wave['rival']['method']}: "
            f"{points(wave['rival']['difference'])} points."
        )
    joined = composed(result["rows"])
    better = list(dict.fromkeys(row["method"] for row in joined if verdict(row) > 0))
    said.append(
        f"Of {len({row['method'] for row in joined})} compositions, {' and '.join(better) or 'none'} "
        f"{'are' if len(better) > 1 else 'is'} clearly above the best method alone that costs no more."
    )
    fewest = min(best[name]["seeds"] for name in (WAVE, *CONTROLS) if name in best)
    if fewest < HEADLINE_SEEDS:
        said.append(no_headline(fewest, TRAIN_ENOUGH))
    return " ".join(said) + "\n"


def _named(row: Row) -> str:
    return f"{accuracy(row['accuracy'], row['interval'])} %" + (" (one seed)" if row["seeds"] == 1 else "")


def _cost(row: Row, dense: Row) -> str:
    return f"{100 * row['gmacs'] / dense['gmacs']:.0f} % of its multiply-adds"


def _note(result: Result) -> str:
    run, pictures = result["conditions"], result["pictures"]
    budgets = ", ".join(f"{100 * share:.0f}" for share in result["budgets"])
    return (
        f"Embedded scale, {run['names']} names on scenes of shape; the first {pictures['test']:,} pictures of test. "
        "Each row is the setting with the "
        f"highest accuracy on the first {pictures['val']:,} of val within {budgets} % of the dense teacher's "
        "multiply-adds (image tower, attention on both sides). A setting, a keep rate and the share of val's pictures "
        "that is refined, serves all training seeds of a method; the threshold for this share is each seed's own. "
        "Accuracies and GMACs are means of the seeds; intervals resample seeds and pictures. WaveCLIPs whose weights "
        "are not there count by the answers that their trainings left, and are not composed. Differences are paired by "
        "picture, and by seed where both methods have the same ones; clearly: Holm's p of the table below "
        f"{SIGNIFICANT}. A composition refines 1 % of val's pictures at least, since with none it is WaveCLIP itself. "
        "Keep: the patch tokens that stay, of the teacher's from its second block on, in a composition of "
        "WaveCLIP's fine level, whose cached coarse tokens all stay; merging methods reach that share over "
        "several blocks, and EViT adds one token, fused of those that go. Nothing was trained for a composition. "
        "Each reducer that alone is the best on val within a budget is composed, unless it reads what a level has not; "
        f"and random tokens are, as their control. {_keeps(result)}"
        "WaveCLIPs and the teacher trained on start from this teacher, the WaveCLIP that says so from the latter: it "
        "has had half as many steps again as any other, so it is no rival (decided after a run in which it was one, "
        "and in which it led WaveCLIP and all compositions). The half-resolution CLIP sees means of 2 x 2 pixels; "
        "making them counts in its time. The cascade asks it first, then the teacher trained on, shares "
        "nothing, and pays both. The rank predictor reads the teacher's 36 patches, so it has no place in a "
        "level. Not here: Patch Ranking's prompts, CrossGET and DynamicViT, which Patch Ranking's table measures; "
        "reducers that choose by the classes' texts; "
        "and A-ViT, which masks the tokens that halt, so that its time would not show what it saves. "
        f"{_mlip(result)} Time from pixels to class "
        "probabilities, of the first seed, × against the dense teacher: batch "
        f"{run['batch']}, medians of {run['rounds']} alternating rounds, {run['dtype']}, {run['device']}, "
        f"{run['threads']} threads, torch {run['torch']}. Dominated: another row is as accurate for no "
        f"more. Test was read {run['test_reads']} times with these models.{remark(run)}"
    )


def _keeps(result: Result) -> str:
    """At which keep rates reducers stand."""
    if not compared(result["rows"]):  # stored before they were compared
        return (
            "With four keep rates a reducer that costs little more than a budget stands there at its next lower rate: "
            "docs/which-reducer.md compares them at equal multiply-adds. "
        )
    return (
        "A reducer alone, and the rank predictor, stands at its greatest keep rate within each budget below 100 %. It "
        "is compared with the reducer that is the best on val within that budget, by the same correction. "
    )


def _mlip(result: Result) -> str:
    if any(row["method"] == "MLIP" for row in result["rows"]):
        return "MLIP and the CLIP beside it were trained for minutes, on their own."
    return "MLIP's rows are not run yet."


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The methods and training seeds without weights."""
    yield from ((f"not trained: {what}", command) for what, command in result["missing"].items())
