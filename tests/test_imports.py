"""The arrows between packages: who may import whom, and that nothing imports itself by a detour."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.readme import ROOT

METHODS = ("waveclip", "mlip", "patchrank")
PAPERS = tuple(f"benchmarks.{method}" for method in METHODS)
ALLOWED = {
    "common": set(),
    "common.data": {"common"},
    "common.evaluate": {"common", "common.data"},
    "common.deploy": {"common", "common.data", "common.evaluate"},
    **{method: {"common", "common.data"} for method in METHODS},
}
"""Part -> the parts that it may import beside itself. A benchmark may import all but another paper's."""


def imported(source):
    """The dotted names that a source's absolute imports may mean, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path):
    """A file's module: common/data/__init__.py is common.data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = ("common", *METHODS, "benchmarks")
FILES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
IMPORTS = {
    module: (imported(path.read_text()) & set(FILES)) - {module}
    for module, path in FILES.items()
    if not module.endswith("__main__")
}


def part_of(module):
    """The longest named part that a module belongs to: common.data.shards to common.data."""
    parts = [part for part in (*ALLOWED, *PAPERS, "benchmarks") if f"{module}.".startswith(f"{part}.")]
    return max(parts, key=len)


def test_every_form_of_import_is_read():
    source = "import a.b as x\nfrom c.d import e\nfrom . import f\ndef g():\n    import h, i.j\n"
    assert imported(source) == {"a.b", "c.d", "c.d.e", "h", "i.j"}


def test_a_module_belongs_to_its_longest_part():
    assert part_of("common.data.embedded.scenes") == "common.data"
    assert part_of("benchmarks.mlip.table9") == "benchmarks.mlip" and part_of("benchmarks.cells") == "benchmarks"


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows_point_one_way(part):
    modules = [module for module in IMPORTS if part_of(module) == part]
    assert modules, f"{part} has no modules"
    allowed = ALLOWED[part] | {part}
    wrong = {
        module: sorted(forbidden)
        for module in modules
        if (forbidden := {other for other in IMPORTS[module] if part_of(other) not in allowed})
    }
    assert not wrong, f"{part} may import only {sorted(allowed)}"


@pytest.mark.parametrize("paper", PAPERS)
def test_a_papers_benchmarks_never_import_anothers(paper):
    others = set(PAPERS) - {paper}
    wrong = {
        module: sorted(forbidden)
        for module in IMPORTS
        if part_of(module) == paper and (forbidden := {m for m in IMPORTS[module] if part_of(m) in others})
    }
    assert not wrong


def test_nothing_outside_the_tests_imports_them():
    for module, path in FILES.items():
        assert not any(name.partition(".")[0] == "tests" for name in imported(path.read_text())), module


def test_no_module_imports_itself_by_a_detour():
    """A package's __init__ re-exports what its modules hold, so it counts as each module's user, not as its source."""
    graph = {module: {m for m in others if not module.startswith(f"{m}.")} for module, others in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
