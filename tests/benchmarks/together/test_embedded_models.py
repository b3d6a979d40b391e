"""The committed embedded models on every split: what is evaluated, and that a read of test is logged."""

import pytest

from benchmarks.embedded import LOGGED, MODELS, REVISION
from benchmarks.together import embedded_models
from common.data.lookup import REVISIONS


@pytest.fixture
def lines(monkeypatch):
    """The command lines of the evaluations, none of which is run."""
    found = []
    monkeypatch.setattr(embedded_models.evaluate, "main", lambda line: found.append(list(line)))
    monkeypatch.setattr(embedded_models, "collect", lambda folders: [])
    return found


@pytest.fixture
def logged(monkeypatch):
    """The reads of test that were logged."""
    found = []
    monkeypatch.setattr(embedded_models.read_log, "record", lambda *read: found.append(read))
    return found


def test_the_models_of_the_current_revision_are_evaluated_on_its_pictures(lines, logged):
    embedded_models.run()
    teacher, student = map(str, MODELS[REVISION])
    assert {line[line.index("--model") + 1] for line in lines} == {teacher, student}
    assert {REVISIONS[line[line.index("--data") + 1]] for line in lines} == {REVISION}
    assert all((student in line) == ("--text-model" in line) for line in lines), "a student has its teacher's texts"


def test_a_whole_run_is_a_read_of_test_and_a_smoke_run_is_none(lines, logged):
    embedded_models.run(smoke=True)
    assert logged == []
    result = embedded_models.run()
    assert logged == [("embedded-models", LOGGED[REVISION], MODELS[REVISION])]
    stated = result["conditions"] | {"test_reads": 3}
    assert "Test was read 3 times" in embedded_models.render(result | {"conditions": stated})["md"]
