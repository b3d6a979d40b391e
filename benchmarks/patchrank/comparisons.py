"""How Patch Ranking differs from other methods, what training adds, and what the golden oracle reaches.

Shapes: S seeds, M pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.cells import percent, points, table
from benchmarks.patchrank.evaluate import RIVALS
from benchmarks.patchrank.methods import DENSE, OURS, titled
from benchmarks.patchrank.rows import ROWS, Known, at_equal_cost, correct, planned
from benchmarks.patchrank.runs import COMMAND
from benchmarks.patchrank.tasks import SEEDS, TASKS, Task
from benchmarks.patchrank.trained_rivals import (
    DROPPING,
    DROPPING_UNTRAINED,
    MERGING,
    MERGING_UNTRAINED,
    TRAINED_RIVALS,
)
from benchmarks.statistics import adjusted_p, difference

EQUAL_KEEP, EQUAL_COST, OWN_COST = "equal keep", "equal GMACs", "own cost"
BASES = (EQUAL_KEEP, EQUAL_COST, OWN_COST)
LEVEL = 0.05
AT_COST = (*TRAINED_RIVALS, MERGING_UNTRAINED, DROPPING_UNTRAINED)
"""What was run at Patch Ranking's cost alone."""
AT_OWN_COST = (DENSE, "A-ViT")
"""What keeps other shares at other costs than Patch Ranking: all tokens, and the depth that A-ViT reached."""
LEARNED = (
    ("CrossGET", MERGING),
    (MERGING, MERGING_UNTRAINED),
    ("DynamicViT", DROPPING),
    (DROPPING, DROPPING_UNTRAINED),
)
"""What learning to choose adds to a tower that is trained alike with a reducer that learns nothing, and what that
training adds to this reducer."""


def rivals(known: Known) -> list[dict[str, Any]]:
    """Patch Ranking's accuracy less each rival's, see ``differences``."""
    return differences(known, [(OURS, name) for name in (DENSE, *RIVALS, "A-ViT", *AT_COST)])


def learned(known: Known) -> list[dict[str, Any]]:
    """The differences of LEARNED, see ``differences``."""
    return differences(known, LEARNED)


def differences(known: Known, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The accuracy of each pair's first method less its second's, by task and by each of BASES.

    A pair stands where both were run. Equal GMACs are Patch Ranking's at ``KEEP``. p is adjusted by Holm over all pairs
    and tasks of one basis.
    """
    rows, found = [], {}
    for task in TASKS:
        entries = ROWS[OURS].entries_of(task, known)
        if not entries:
            continue
        answers = {name: _answers(name, task, known, entries[0]["gmacs"]) for pair in pairs for name in pair}
        for first, second in pairs:
            for basis, ours in answers[first].items():
                theirs = answers[second].get(basis)
                if theirs is None:
                    continue
                seeds = [ROWS[name].seeds_of(task, known) for name in (first, second)]
                gap = difference(ours, theirs, paired_seeds=seeds[0] == seeds[1] and len(ours) > 1)
                found[task.name, first, second, basis] = gap
                row = {"task": task.name, "of": first, "rival": second, "basis": basis, "lead": gap.ends}
                # What needs no training has no seeds, and a verdict as many as the trained side with the fewest.
                counts = [len(right) for name, right in ((first, ours), (second, theirs)) if planned(name) > 1]
                rows.append(row | {"seeds": min(counts)})
    for basis in BASES:
        adjusted = adjusted_p({key: gap for key, gap in found.items() if key[-1] == basis})
        for row in (row for row in rows if row["basis"] == basis):
            row["adjusted"] = adjusted[row["task"], row["of"], row["rival"], basis]
    return rows


def _answers(name: str, task: Task, known: Known, budget: float) -> dict[str, Tensor]:
    """A method's answers [S,M] by basis, those that there are."""
    entries = ROWS[name].entries_of(task, known)
    bases = {OURS: BASES, **dict.fromkeys(AT_COST, (EQUAL_COST,)), **dict.fromkeys(AT_OWN_COST, (OWN_COST,))}
    found = {basis: correct(entries).float() if entries else None for basis in bases.get(name, (EQUAL_KEEP,))}
    if name in RIVALS:
        found[EQUAL_COST] = at_equal_cost(name, task, known, budget)
    return {basis: values for basis, values in found.items() if values is not None}


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a pair's first method is better or worse than its second, or that this is not shown, or "one seed"."""
    if row["seeds"] < len(SEEDS):
        return "one seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
    if row["adjusted"] >= LEVEL:
        return "not shown"
    return "better" if row["lead"][0] > 0 else "worse"


def rivals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The differences as a table, a rival a line."""
    if not rows:
        return f"Differences from other methods: not run (`{COMMAND}`)."
    columns = list(dict.fromkeys((row["task"], basis) for row in rows for basis in BASES))
    cells = {(row["rival"], row["task"], row["basis"]): f"{points(row['lead'])} {verdict(row)}" for row in rows}
    lines = [
        [titled(name), *(cells.get((name, *column), "–") for column in columns)]
        for name in dict.fromkeys(row["rival"] for row in rows)
    ]
    note = (
        f"{OURS} with each task's own predictor, untuned, less the method of the line, in points, 95 % intervals over "
        "seeds and pictures. Better or worse: p below .05 after Holm's correction over the comparisons of one basis. "
        "At equal GMACs the method keeps more patches, as many as the predictor's cost buys; its answers are "
        "interpolated between two numbers of patches. CrossGET, DynamicViT and their controls stand at that cost or up "
        "to 6 % below, and are compared at it alone. All tokens and A-ViT cost more than Patch Ranking: A-ViT goes "
        "through more blocks than its training asks for, though its distribution loss weighs a hundred times as much "
        "as released, and its gates are the paper's, 5 and -10, where the released ones are 10 and -30."
    )
    return f"{table([f'{OURS} less', *(', '.join(column) for column in columns)], lines)}\n\n{note}"


def learned_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What training adds as a table, a pair a line."""
    if not rows:
        return f"What training adds: not run (`{COMMAND}`)."
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["of"], row["rival"], row["task"]): f"{points(row['lead'])} {verdict(row)}" for row in rows}
    lines = [
        [f"{first} less {second}", *(cells.get((first, second, task), "–") for task in tasks)]
        for first, second in LEARNED
    ]
    note = (
        f"What training adds, in points. {MERGING} learns as CrossGET does, without the cross tokens; {DROPPING}, as "
        "long and as fast as DynamicViT's tower, at its blocks, without its modules; the modules' cost buys it more "
        "patches. All have the greatest rate within Patch Ranking's GMACs, up to 6 % fewer; the controls without "
        "training have their trained sibling's rate and blocks. Intervals and verdicts as above, Holm's correction "
        "over this table. The trained controls were added after a first seed of their rivals had been read on test, "
        "the untrained ones after their siblings' three."
    )
    return f"{table(['', *tasks], lines)}\n\n{note}"


def oracle(known: Known) -> list[dict[str, Any]]:
    """Both searches of the golden oracle beside other rows on the same test pictures, by task."""
    rows = []
    for task in TASKS:
        baselines = known.get(f"{task.key}-baselines")
        if baselines is None:
            continue
        found = baselines["oracle"]
        count = found["greedy"]["pictures"]
        for name, label in (("greedy", "golden ranking, three rounds"), ("searched", "golden ranking, searched")):
            row = {"task": task.name, "row": label, "accuracy": [found[name]["accuracy"]]}
            rows.append(row | {"lost": found[name]["lost"], "pictures": count})
        for name in (DENSE, *RIVALS, OURS):
            entries = ROWS[name].entries_of(task, known)
            if entries:
                right = correct(entries)
                part = right[:, task.chosen(right.shape[1], count)].double().mean(1).tolist()
                rows.append({"task": task.name, "row": name, "accuracy": part, "lost": None, "pictures": count})
    return rows


def oracle_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The oracle beside other rows as a table, a row a line."""
    if not rows:
        return f"Golden oracle: not run (`{COMMAND}`)."
    tasks = {row["task"]: row["pictures"] for row in rows}
    by_key = {(row["row"], row["task"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        found = [by_key.get((name, task)) for task in tasks]
        top1 = [percent(row["accuracy"]) if row else "not run" for row in found]
        lost = [f"{row['lost']:.4f}" if row and row["lost"] is not None else "–" for row in found]
        lines.append([name, *top1, *lost])
    head = ["keep .6, some of the test pictures", *(f"{task}, top-1" for task in tasks)]
    head += [f"{task}, 1 - cosine" for task in tasks]
    pictures = ", ".join(f"{task} {count}" for task, count in tasks.items())
    note = (
        "What the golden oracle is: it ranks the test pictures themselves, by what their embeddings lose; it reads no "
        "labels. The first line is the ranking that predictors learn: windows of 2x2 patches, three rounds. The second "
        "removes single patches in eight rounds or more, then exchanges kept and dropped ones while that helps. Both "
        "searches are greedy, and the embedding of all patches is itself often wrong. So neither line bounds the "
        f"accuracy of other methods. Pictures: {pictures}."
    )
    return f"{table(head, lines)}\n\n{note}"
