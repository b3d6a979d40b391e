"""The commands of README and docs name what exists, and the house rules that a machine can check hold."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.registry import BENCHMARKS
from common.cli import COMMANDS, SUBCOMMANDS, main
from tests.readme import NEEDS, PAGES, ROOT, blocks
from tests.test_configs import RUNS

FOLDERS = ("common", "waveclip", "mlip", "patchrank", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
WRITTEN_TARGETS = set(re.findall(r"^([a-z0-9%-]+):", (ROOT / "Makefile").read_text(), re.M))
MAKE_TARGETS = WRITTEN_TARGETS | {f"reproduce-{entry.name}" for entry in BENCHMARKS}
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


def test_blocks_are_told_apart_by_the_comment_before_them():
    text = (
        "```bash\nmake test  # quick\n```\n<!-- needs: network, gpu -->\n\n```bash\na \\\n  b\n```\n"
        "```python\nno()\n```\n<!-- a remark -->\n```bash\nc\n```\n"
        "<!-- table: deploy -->\n```bash\nd\n```\n<!-- /table -->\n```bash\nSMOKE=1 make reproduce-e\n```\n"
    )
    found = blocks(text)
    assert [block.commands() for block in found] == [["make test"], ["a b"], ["c"], ["d"], ["SMOKE=1 make reproduce-e"]]
    assert [block.needs for block in found] == [set(), {"network", "gpu"}, set(), set(), set()]
    assert [block.runs for block in found] == [True, False, True, False, False]


def _words(command: str) -> list[str]:
    """The words of a shell command without the variables set before or after it (`SMOKE=1 make x ONLY=y`)."""
    return [word for word in shlex.split(command) if not ASSIGNMENT.fullmatch(word)]


def _recipes(words: list[str]) -> list[Path]:
    """The recipe and its overlays, where a command says nothing else; tests/test_configs.py parses them."""
    return [ROOT / file for file in words[1::2]] if set(words[::2]) == {"-c"} else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_names_what_exists(page):
    page_blocks = blocks(page.read_text())
    assert page_blocks, f"{page.name} shows no command"
    for block in page_blocks:
        assert block.needs <= NEEDS, f"unknown need in {sorted(block.needs)}; one of {sorted(NEEDS)}"
        for command in block.commands():
            words = _words(command)
            if words[:1] == ["make"]:
                targets = [word for word in words[1:] if not word.startswith("-")]
                assert set(targets) <= MAKE_TARGETS, f"{command!r} is not in the Makefile"
            if words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), f"{command!r} names no module"
            parsed = words[1:2] == ["fit"] and _recipes(words[2:]) in RUNS
            if words[0] in ("lightning", "effclip") and words[1] in SUBCOMMANDS and not parsed:
                with pytest.raises(SystemExit) as stop:
                    main([*words[1:], "--print_config"])
                assert stop.value.code in (0, None), f"{command!r} is not accepted"
            if words[0] == "effclip" and words[1] in COMMANDS:
                importlib.import_module(COMMANDS[words[1]]).parser().parse_args(words[2:])


def test_pages_compare_models_on_other_pictures_than_tests():
    """The benchmark's pictures of test are read for tables, which log it. ``--budget`` chooses on val before it reads.

    Retrieval has a split of its own. Linear probes are scored on test alone, so they stand where CI does not run them.
    """
    reads = []
    for page in PAGES:
        for block in blocks(page.read_text()):
            for command in block.commands():
                words = _words(command)
                if words[:1] == ["effclip"] and words[1] in ("evaluate", "sweep"):
                    args = importlib.import_module(COMMANDS[words[1]]).parser().parse_args(words[2:])
                    tasks = args.tasks if words[1] == "evaluate" else args.task
                    of_test = args.split in (None, "test") and getattr(args, "budget", None) is None
                    if args.data.startswith("embedded") and tasks != "retrieval" and of_test:
                        reads += [command] if block.runs or "linear-probe" not in tasks else []
    assert not reads


def test_ci_runs_what_readme_begins_with():
    _, first, *others = blocks(PAGES[0].read_text())  # after the installation
    assert first.commands() == ["make reproduce-table2"], "make smoke runs every table of the registry"
    assert sum(block.runs for block in others) >= 3


def test_no_command_block_stands_on_two_pages():
    scripts = [block.script for page in PAGES for block in blocks(page.read_text())]
    assert len(set(scripts)) == len(scripts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Pictures of results may wait for their run; a heading's link is the heading in small letters and dashes."""
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", page.read_text()):
        file, _, heading = "".join(target).partition("#")
        if file.startswith(("http:", "https:")):
            continue
        path = (page.parent / file).resolve() if file else page
        waiting = path.parent == ROOT / "benchmarks/results" and path.stem in {entry.name for entry in BENCHMARKS}
        assert path.exists() or waiting, f"{page.name} links to {file}, which is not there"
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name} links to {file}#{heading}, a heading that is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_import_what_exists(page):
    for script in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(script)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), f"{page.name}: {ast.unparse(node)}"


def test_blocks_that_ci_runs_do_not_install():
    for page in PAGES:
        for block in blocks(page.read_text()):
            installs = re.search(r"git clone|make setup|pip install", block.script)
            assert not block.runs or not installs, f"needs the network, so mark it:\n{block.script}"


def test_make_help_explains_every_target():
    explained = set(re.findall(r"^([a-z0-9%-]+):.*## \S", (ROOT / "Makefile").read_text(), re.M))
    assert explained == WRITTEN_TARGETS


def test_files_and_functions_stay_short():
    """One idea a file: at most 400 lines, 60 of a function."""
    long = []
    for path in SOURCES:
        text, name = path.read_text(), path.relative_to(ROOT)
        if len(text.splitlines()) > 400:
            long.append(f"{name}: {len(text.splitlines())} lines")
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        long += [f"{name}: {n.name}" for n in functions if n.end_lineno - n.lineno + 1 > 60]
    assert not long


def test_files_that_text_names_are_there():
    """In pages, code and recipes; a result file may wait for its run."""
    name = re.compile(
        r"(?<![\w/{.])(?:common|waveclip|mlip|patchrank|benchmarks|tests|docs)/[\w/-]+\.(?:py|yaml|md|tsv)\b"
    )
    texts = [*PAGES, *SOURCES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *ROOT.glob("*/*.yaml")]
    lost = {
        f"{path.relative_to(ROOT)}: {file}"
        for path in texts
        for file in name.findall(path.read_text())
        if not (ROOT / file).is_file() and "results/" not in file and not path.is_relative_to(ROOT / "tests")
    }
    assert not lost
