"""`make` on a bare machine says in one line what is missing; `make reproduce-NAME` is the benchmark of that name."""

import os
import subprocess

import pytest

from tests.readme import ROOT

OLD = '#!/bin/sh\ncase "$*" in *version_info*) exit 1;; esac\n'
WITHOUT_VENV = '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n'


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (None, "is not there; install Python 3.11 or newer"),
        (OLD, "is older than 3.11"),
        (WITHOUT_VENV, "has no venv module; install it"),
    ],
)
def test_what_is_missing_is_one_line(script, line, tmp_path):
    python = tmp_path / "python3"
    if script:
        python.write_text(script)
        python.chmod(0o755)
    # As from a shell, also when `make test` runs this test: a make inside a make says which directory it enters.
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    call = ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=outer)
    assert made.returncode != 0
    told = [text for text in (made.stdout + made.stderr).splitlines() if "***" not in text]
    assert len(told) == 1 and line in told[0] and str(python) in told[0]


def test_a_table_is_the_benchmark_of_its_name():
    call = ["make", "--dry-run", "reproduce-table2", "VENV=here"]
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "here/bin/python -m benchmarks table2" in made.stdout.splitlines()
