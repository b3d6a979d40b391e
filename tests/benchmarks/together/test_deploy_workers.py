"""Engines in processes of their own: what they answer, and what becomes of one that fails."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.together import deploy_cases, deploy_costs, deploy_tables, deploy_workers
from benchmarks.together.deploy_cases import CASCADE, DENSE, WAVE
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Engine, Prepared, _torch, ending, engines
from benchmarks.together.deploy_workers import Runner, workers
from tests.benchmarks.together.lost_engines import ends_at_batch_1, refuses

PYTORCH = replace(engines()[0][REFERENCE], program=None)


@pytest.fixture
def case(monkeypatch, tmp_path):
    """The tiny towers with random weights, of which nothing is exported."""

    def prepare(deployed, options, labels, folder, images):
        return Prepared.of(deployed, options, labels, folder)

    monkeypatch.setattr(deploy_cases, "prepare", prepare)
    return deploy_cases.of_random_weights(tmp_path, smoke=True)


def test_a_process_answers_as_this_one_does_in_every_dtype(case):
    both, found, labels = {REFERENCE: PYTORCH, "bf16": _torch(torch.bfloat16)}, {}, torch.arange(32)
    images = case.seen([torch.randn(32, 3, how.size, how.size) for how in case.views])
    with workers(both, case.work) as team:
        for name, engine in both.items():
            here = Runner(engine.graphs, case.work)
            for side in (DENSE, WAVE, CASCADE):
                expected = here.answer(side, images[side], labels)
                found[name, side] = team.ask(name, "answer", side, images[side], labels)
                torch.testing.assert_close(found[name, side], expected)
                spent = team.ask(name, "time", side, 0.5, 8)
                assert spent.seconds > 0 and spent.peak_bytes is None
    assert found[REFERENCE, DENSE][0].shape == (0, 32) and found[REFERENCE, WAVE][0].shape[1] == 32
    assert found[REFERENCE, CASCADE][0].shape == (1, 32) and found[REFERENCE, CASCADE][1].shape == (2, 32)
    assert not torch.equal(found[REFERENCE, WAVE][0], found["bf16", WAVE][0])


def test_a_cascade_answers_as_its_models_do_alone_and_its_second_sees_only_the_rest(case):
    made = []

    def graphs(prepared):
        module = PYTORCH.graphs(prepared)
        size = prepared.deployed.model.image_size

        def run(*tensors):
            made.append((size, len(tensors[0])))
            return module[0](*tensors)

        return [run, *module[1:]]

    runner = Runner(graphs, case.work)
    margins, right = runner.answer(CASCADE)
    small, dense = (part.prepared.deployed.model.images for part in case.work[CASCADE])
    with torch.no_grad():
        scores = [
            (part.prepared.deployed.scale * model.encode_image(part.images) @ part.classes.T).softmax(-1)
            for part, model in zip(case.work[CASCADE], (small, dense), strict=True)
        ]
    first, second = scores[0].topk(2).values.T
    torch.testing.assert_close(margins[0], first - second, atol=1e-5, rtol=0)
    assert (right[0] == (scores[0].argmax(-1) == scores[1].argmax(-1))).all() and right[1].all()
    made.clear()
    runner.time(CASCADE, margins[0].sort().values[12:14].mean().item(), 16)
    (half, whole), counts = case.views, [(size, count) for size, count in made]
    assert [count for size, count in counts if size == half.size] == [16, 16]
    assert sum(count for size, count in counts if size == whole.size) == 13, "those below the threshold"


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
    text = "\n".join(deploy_tables.parts({"missing": {}, "tables": {"random": table}}, {}))
    assert "; ends (its process ended with signal 9 (Killed))." in text and "nan" not in text


def test_without_a_reference_there_is_no_table(case):
    with (
        pytest.raises(ValueError, match=r"PyTorch fp32: RuntimeError: no such graph for .* every row is compared"),
        workers({REFERENCE: Engine(refuses, PYTORCH.size)}, case.work),
    ):
        pytest.fail("nothing is to be measured")


def test_a_process_computes_with_the_threads_of_this_one(case):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with (
            pytest.warns(UserWarning, match=f"for {threads + 1} threads; the table goes on without it"),
            workers({"new": Engine(refuses, PYTORCH.size)}, case.work) as team,
        ):
            assert list(team.lost) == ["new"]
    finally:
        torch.set_num_threads(threads)


def test_beside_an_engines_own_threads_torch_has_one(case):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Runner(PYTORCH.graphs, case.work)
        assert torch.get_num_threads() == 2
        Runner(PYTORCH.graphs, case.work, own_threads=True)
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


def test_engines_that_memory_does_not_hold_together_take_turns_in_groups(case, tmp_path):
    found = dict.fromkeys(("a", REFERENCE, "b", REFERENCE_INT8, "c"), PYTORCH)
    table = deploy_costs._table(replace(case, at_once=4), found, tmp_path, 1, smoke=True)
    assert table["groups"] == [["a", REFERENCE, REFERENCE_INT8, "c"], [REFERENCE, "b", REFERENCE_INT8]]
    whole = [(name, side) for name in found for side in (DENSE, *[WAVE] * 3, *[CASCADE] * 3)]
    assert [(row["engine"], row["side"]) for row in table["rows"]] == whole
    assert all(len(speed["ratios"]) == 1 for row in table["rows"] for speed in row["speed"].values())
    text = "\n".join(deploy_tables.parts({"missing": {}, "tables": {"random": table}}, {}))
    assert "The engines take turns in 2 groups, because memory does not hold all of them at once." in text
