"""Engines in processes of their own: what they answer, and what becomes of one that fails."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.together import deploy_costs, deploy_tables, deploy_workers
from benchmarks.together.deploy_costs import DENSE, WAVE
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Engine, Prepared, _torch, ending, engines
from benchmarks.together.deploy_workers import Runner, Work, workers
from tests.benchmarks.together.lost_engines import ends_at_batch_1, refuses

PYTORCH = replace(engines()[0][REFERENCE], program=None)


@pytest.fixture
def case(monkeypatch, tmp_path):
    """The tiny towers with random weights, of which nothing is exported."""

    def prepare(deployed, options, labels, folder, images):
        return Prepared(deployed, options, labels, folder)

    monkeypatch.setattr(deploy_costs, "prepare", prepare)
    return deploy_costs._random(tmp_path, smoke=True)


def test_a_process_answers_as_this_one_does_in_every_dtype(case):
    work, labels = Work(case.models, case.classes, case.images), torch.arange(len(case.images))
    both, found = {REFERENCE: PYTORCH, "bf16": _torch(torch.bfloat16)}, {}
    with workers(both, work) as team:
        for name, engine in both.items():
            here = Runner(engine.graphs, work)
            for side in (DENSE, WAVE):
                expected = here.answer(side, case.images, labels)
                found[name, side] = team.ask(name, "answer", side, case.images, labels)
                torch.testing.assert_close(found[name, side], expected)
            spent = team.ask(name, "time", WAVE, 0.5, 8)
            assert spent.seconds > 0 and spent.peak_bytes is None
    assert found[REFERENCE, DENSE][0].shape == (0, 32) and found[REFERENCE, WAVE][0].shape[1] == 32
    assert not torch.equal(found[REFERENCE, WAVE][0], found["bf16", WAVE][0])


def test_an_engine_that_fails_is_named_and_the_rows_of_the_others_stay(case, tmp_path):
    found = dict.fromkeys((REFERENCE, REFERENCE_INT8), PYTORCH)
    found |= {"refuses": Engine(refuses, PYTORCH.size), "ends": Engine(ends_at_batch_1, PYTORCH.size)}
    threads = torch.get_num_threads()
    with pytest.warns(UserWarning, match="the table goes on without it"):
        table = deploy_costs._table(case, found, tmp_path, 1, smoke=True)
    lost = {
        "refuses": f"RuntimeError: no such graph for {threads} threads",
        "ends": "its process ended with signal 9 (Killed)",
    }
    assert table["missing"] == lost
    assert (
        {row["engine"] for row in table["rows"]} == {need["engine"] for need in table["needs"]} == set(found) - {*lost}
    )
    text = "\n".join(deploy_tables.parts({"missing": {}, "tables": {"random": table}}))
    assert "; ends (its process ended with signal 9 (Killed))." in text and "nan" not in text


def test_without_a_reference_there_is_no_table(case):
    with (
        pytest.raises(ValueError, match=r"PyTorch fp32: RuntimeError: no such graph for .* every row is compared"),
        workers({REFERENCE: Engine(refuses, PYTORCH.size)}, Work(case.models, case.classes, case.images)),
    ):
        pytest.fail("nothing is to be measured")


def test_a_process_computes_with_the_threads_of_this_one(case):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with (
            pytest.warns(UserWarning, match=f"for {threads + 1} threads; the table goes on without it"),
            workers({"new": Engine(refuses, PYTORCH.size)}, Work(case.models, case.classes, case.images)) as team,
        ):
            assert list(team.lost) == ["new"]
    finally:
        torch.set_num_threads(threads)


def test_beside_an_engines_own_threads_torch_has_one(case):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Runner(PYTORCH.graphs, Work(case.models, case.classes, case.images))
        assert torch.get_num_threads() == 2
        Runner(PYTORCH.graphs, Work(case.models, case.classes, case.images), own_threads=True)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_how_a_process_ended_is_said_in_words():
    assert ending(3) == "exit code 3" and ending(-11) == "signal 11 (Segmentation fault)"


def test_a_turn_ends_when_the_threads_of_the_engine_do(monkeypatch):
    slept, computed = [], iter([0.0, 0.01, 0.01, 0.02, 0.02, 0.0201])
    clock = SimpleNamespace(process_time=lambda: next(computed), sleep=slept.append)
    monkeypatch.setattr(deploy_workers, "time", clock)
    deploy_workers._settle()
    assert len(slept) == 3, "a spinning thread computes as long as the clock runs"
