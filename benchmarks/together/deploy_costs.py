"""What a dense CLIP, a WaveCLIP and a cascade cost on every engine: images/s, accuracy, size, start-up and memory.

Shapes: M images, L levels of a model or cascade.

Every engine runs the same early exit, in a process of its own (``deploy_workers``). Thresholds are chosen on ``val``
with the engine's own answers, so that all engines refine the same share; ``test`` gives the numbers and nothing else.
``deploy_cases`` brings models and pictures, ``deploy_tables`` writes the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import ceil, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import read_log
from benchmarks.cells import accuracy_of
from benchmarks.together.deploy_cases import (
    BATCHES,
    DENSE,
    MODELS,
    RANDOM,
    SHAPES,
    WORKERS,
    Case,
    committed,
    named,
    of_random_weights,
    of_shapes,
    of_user,
    title,
)
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Engine, engines, first_answers
from benchmarks.together.deploy_workers import Workers, give_back_memory, workers
from benchmarks.training.shapes import HALF, STUDENT, TEACHER
from common.conditions import conditions, digest
from common.data.lookup import Labelled
from common.deploy.model import Deployed
from common.early_exit import exit_at, threshold_for
from common.evaluate.accuracy import paired_difference
from common.evaluate.tasks import Settings, pictures_of_each
from common.paths import runs_directory
from common.progress import bar
from common.timing import Timed, rounds_ratio, take_turns

POINTS = {"low": 0.15, "mid": 0.27, "high": 0.56}
"""Operating points of early exit: the share of images that the first level does not answer."""
REFERENCES = (REFERENCE, REFERENCE_INT8)
Key = tuple[str, str]
"""An engine's name, and one of the models of a ``Case``."""


def measure(smoke: bool = False) -> dict[str, Any]:
    """All tables: the models of the scenes of shape, those of ``named``, random ViT-B/16.

    Finished tables are stored as they come, so that a run which was interrupted goes on behind them.
    smoke: few pictures, one round, and the smallest towers in place of ViT-B/16; nothing is stored.
    ValueError: as ``named``.
    """
    given = named()
    found, missing = engines()
    if given is None and committed("cifar10").keys() >= {"DENSE", "WAVECLIP"}:
        missing["CIFAR-10"] = "DATA=DIR, its folder as docs/photos.md says"
    stored = None if smoke else _Stored(given, list(found))
    result: dict[str, Any] = {"missing": missing, "tables": stored.tables() if stored else {}}
    makers = _makers(given, smoke)
    with TemporaryDirectory() as place:
        folders = {name: Path(place) / str(number) for number, name in enumerate(makers)}  # a name may hold a slash
        # All exports come first, so that models which cannot be exported are known before anything is measured.
        cases = {name: make(folders[name]) for name, make in makers.items() if name not in result["tables"]}
        for name, case in cases.items():
            _forget(cases.values())
            result["tables"][name] = _table(case, found, folders[name], _rounds(name, smoke), smoke)
            if stored:
                stored.write(result["tables"])
    if stored:
        stored.forget()
    return result


def timed_again(costs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Costs that were measured before, with the images/s of the tables of these names measured anew.

    Accuracies, thresholds and everything else stay, since they do not depend on what else the machine did.
    ValueError: there is no such table, or its models have other weights now.
    """
    makers, (found, _) = _makers(named(), smoke=False), engines()
    if unknown := set(names) - (costs["tables"].keys() & makers.keys()):
        raise ValueError(f"TIMES: no table {sorted(unknown)}; there are {list(costs['tables'])}, with the DATA of each")
    tables = dict(costs["tables"])
    with TemporaryDirectory() as place:
        for number, name in enumerate(names):
            case, table = makers[name](Path(place) / str(number)), tables[name]
            if {side: _files(prepared.deployed) for side, prepared in case.models.items()} != table["weights"]:
                raise ValueError(f"TIMES: {name} was measured with other weights; leave TIMES out to measure it whole")
            _forget([case])
            measured = {row["engine"] for row in table["rows"]}
            here = {engine: made for engine, made in found.items() if engine in measured}
            groups = [[engine for engine in group if engine in here] for group in table["groups"]]
            rows, lost = _in_groups(case, here, groups, partial(_kept, table["rows"]), table["timed"], _rounds(name))
            answered = table.get("answered", table["conditions"])
            again = {"rows": rows, "answered": answered, "conditions": conditions("embedded")}
            tables[name] = {**table, **again, "missing": table["missing"] | lost}
    return {**costs, "tables": tables}


def _kept(rows: Sequence[Mapping[str, Any]], keys: Sequence[Key], team: Workers) -> list[dict[str, Any]]:
    """A copy of the rows that were measured before, of some engines and models."""
    return [dict(row) for row in rows if (row["engine"], row["side"]) in keys]


def _makers(given: Mapping[str, str] | None, smoke: bool) -> dict[str, Callable[[Path], Case]]:
    """What makes the case of each table. given: as of ``named``."""
    makers: dict[str, Callable[[Path], Case]] = {SHAPES: partial(of_shapes, smoke=smoke)}
    if given:
        makers[title(given["DATA"])] = partial(of_user, given, smoke=smoke)
    return makers | {RANDOM: partial(of_random_weights, smoke=smoke)}


def _rounds(name: str, smoke: bool = False) -> int:
    return 1 if smoke else 3 if name == RANDOM else 11


class _Stored:
    """Tables of a run that was interrupted, which count for the same clean revision, machine, weights and engines.

    given: as of ``named``.
    """

    def __init__(self, given: Mapping[str, str] | None, engines: Sequence[str]) -> None:
        models = (TEACHER, STUDENT, HALF, *(Path(given[name]) for name in MODELS if given and name in given))
        files = [file for model in models for file in (model, *sorted(model.rglob("*"))) if file.is_file()]
        weights = {str(file): digest(file) for file in files}
        self._made_by = conditions("embedded", given=given, weights=weights, engines=engines)
        del self._made_by["date"]
        self._file = runs_directory() / "deploy-tables.json"

    def tables(self) -> dict[str, Any]:
        """The finished tables by name; none where anything else has changed."""
        found = json.loads(self._file.read_text()) if self._file.is_file() else {}
        return found["tables"] if self._made_by["clean"] and found.get("made_by") == self._made_by else {}

    def write(self, tables: Mapping[str, Any]) -> None:
        """Store the tables that are finished."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"made_by": self._made_by, "tables": tables}))

    def forget(self) -> None:
        """The run is complete, so the next one measures anew."""
        self._file.unlink(missing_ok=True)


def _table(case: Case, found: Mapping[str, Engine], folder: Path, rounds: int, smoke: bool) -> dict[str, Any]:
    """Rows for each engine and operating point, and what each engine needs for each of the models."""
    at_start, timed = conditions("embedded"), len(case.work[DENSE][0].images)
    if case.logged and not smoke:
        read = [
            made.options[name] for made in case.models.values() for name in ("model", "first") if name in made.options
        ]
        read_log.record("deploy", case.logged, map(Path, dict.fromkeys(read)))
        at_start["reads_of_test"] = read_log.reads_of_all(case.logged)
    groups, pictures = _groups(list(found), case.at_once), {}

    def rows_of(keys: Sequence[Key], team: Workers) -> list[dict[str, Any]]:
        some, counted = _accuracies(case, keys, team)
        pictures.update(counted)
        return some

    rows, lost = _in_groups(case, found, groups, rows_of, timed, rounds)
    needs = _needs(case, {name: engine for name, engine in found.items() if name not in lost}, folder, lost, smoke)
    return {
        "conditions": at_start,
        "weights": {side: _files(prepared.deployed) for side, prepared in case.models.items()},
        "steps": case.steps,
        "rows": rows,
        "groups": groups,
        "needs": needs,
        "missing": lost,
        "pictures": pictures,
        "rounds": rounds,
        "timed": timed,
    }


def _in_groups(
    case: Case,
    found: Mapping[str, Engine],
    groups: Sequence[Sequence[str]],
    rows_of: Callable[[Sequence[Key], Workers], list[dict[str, Any]]],
    timed: int,
    rounds: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of all groups of engines with their speed, and the engines that were lost with the reason.

    rows_of: the rows of some engines and models without their speed.  timed: images in a pass.
    """
    rows: list[dict[str, Any]] = []
    lost: dict[str, str] = {}
    for group in groups:
        again = REFERENCES if rows else ()  # their own rows are those of the first group
        keys = [(name, side) for name in group for side in case.models if side == DENSE or name not in again]
        with workers({name: found[name] for name in group}, case.work) as team:
            some = rows_of(keys, team)
            _time(some, timed, team, rounds)
        rows += [row for row in some if row["engine"] not in (*team.lost, *again)]
        lost |= team.lost
    rows.sort(key=lambda row: list(found).index(row["engine"]))
    return rows, lost


def _groups(names: Sequence[str], at_once: int | None) -> list[list[str]]:
    """Engines whose processes stand side by side: at most ``at_once``, both references in every group."""
    others = [name for name in names if name not in REFERENCES]
    count = ceil(len(others) / (at_once - len(REFERENCES))) if at_once and others else 1
    return [[name for name in names if name in (*REFERENCES, *others[number::count])] for number in range(count)]


def _accuracies(case: Case, keys: Sequence[Key], team: Workers) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of engines that are not lost, without their speed, and how many pictures of val and test they answered.

    Without test the shares are met on the images that are timed.
    """
    if case.test is None:
        answers = {"val": {(name, side): team.ask(name, "answer", side) for name, side in keys}}
    else:
        splits = (("val", case.val), ("test", case.test))
        answers = {split: _answers(case, keys, team, data) for split, data in splits}
    rows = [row for key in keys if key[0] not in team.lost for row in _points(key, answers)]
    counted = {} if case.test is None else answers
    return rows, {split: some[REFERENCE, DENSE][1].shape[1] for split, some in counted.items()}


def _forget(cases: Iterable[Case]) -> None:
    """Let go of all models, which each engine's process loads for itself, and of what exports have left."""
    for case in cases:
        for prepared in (*case.models.values(), *(part.prepared for parts in case.work.values() for part in parts)):
            prepared.forget()
    give_back_memory()


def _files(deployed: Deployed) -> dict[str, str]:
    """The digests of a model's files; those of a cascade's first model begin with "first/"."""
    first = {} if deployed.first is None else deployed.first.model.files
    return {**deployed.model.files, **{f"first/{name}": value for name, value in first.items()}}


def _needs(
    case: Case, found: Mapping[str, Engine], folder: Path, lost: dict[str, str], smoke: bool
) -> list[dict[str, Any]]:
    """Size, start-up and memory of each engine for each of the models; a start that fails is added to ``lost``."""
    size, picture = case.models[DENSE].deployed.model.image_size, folder / "picture.png"
    Image.effect_noise((size, size), 64).convert("RGB").save(picture)
    needs = []
    for name, engine in found.items():
        for side, prepared in case.models.items():
            small = smoke and (side != DENSE or name not in REFERENCES)
            try:
                measured = None if small else first_answers(engine, prepared, picture)
            except ValueError as error:
                measured, lost[f"the start of {name}, {side}"] = None, str(error)
            needs.append({"engine": name, "model": side, "bytes": engine.size(prepared), "first": measured})
    return needs


def _points(key: Key, answers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one engine and model: one of DENSE, and one of early exit at each of POINTS."""
    engine, side = key
    margin, _ = answers["val"][key]
    for point, share in ({"": 0.0} if side == DENSE else POINTS).items():
        threshold = threshold_for(margin[0], share) if len(margin) else 0.0
        row: dict[str, Any] = {"engine": engine, "side": side, "point": point, "threshold": threshold}
        if "test" in answers:
            margin_of_test, correct = answers["test"][key]
            right, shares = exit_at(threshold, margin_of_test, correct)
            dense, dense_int8 = (answers["test"][name, DENSE][1][-1] for name in REFERENCES)
            row |= accuracy_of(right) | {"refined": 1 - shares[0]}
            row |= {"against": paired_difference(right, dense), "against_int8": paired_difference(right, dense_int8)}
        yield row


def _answers(case: Case, keys: Sequence[Key], team: Workers, data: Labelled) -> dict[Key, tuple[Tensor, Tensor]]:
    """What ``Runner.answer`` of every engine that is not lost gives for all pictures, from one reading of the data."""
    parts: dict[Key, list[tuple[Tensor, Tensor]]] = {key: [] for key in keys}
    settings, start = Settings(64, WORKERS, limit=case.limit), 0
    for images, labels in bar(pictures_of_each(case.views, data, settings), f"answering {data.split}"):
        rows = torch.arange(-start % case.every, len(labels), case.every)
        start += len(labels)
        seen = case.seen([x[rows] for x in images])
        for (name, side), some in parts.items() if len(rows) else ():
            some.append(team.ask(name, "answer", side, seen[side], labels[rows]))
    return {
        key: tuple(torch.cat(tensors, -1) for tensors in zip(*some, strict=True))
        for key, some in parts.items()
        if key[0] not in team.lost
    }


def _time(rows: Sequence[dict[str, Any]], count: int, team: Workers, rounds: int) -> None:
    """Add "speed" to each row: images/s by batch size, and its ratio to both dense references in each round.

    count: images in a pass. An engine that is lost takes NaN seconds.
    """
    keys = [(row["engine"], row["side"]) for row in rows]
    for row in rows:
        row["speed"] = {}
    for batch in BATCHES:
        turns = {str(place): partial(_turn, team, row, batch) for place, row in enumerate(rows)}
        measured = list(take_turns(turns, rounds).values())
        dense, dense_int8 = (measured[keys.index((name, DENSE))] for name in REFERENCES)
        for row, spent in zip(rows, measured, strict=True):
            row["speed"][str(batch)] = {
                "images_per_second": count / spent["seconds"],
                "ratios": rounds_ratio(dense, spent),
                "ratios_int8": rounds_ratio(dense_int8, spent),
            }


def _turn(team: Workers, row: Mapping[str, Any], batch: int) -> Timed:
    found = team.ask(row["engine"], "time", row["side"], row["threshold"], batch)
    return Timed(nan, None) if found is None else found
