"""Dependencies run one way: the methods stand on common and never on each other; benchmarks on all."""

import ast

import pytest

from tests.readme import ROOT

ALLOWED = {
    "common": set(),
    "waveclip": {"common"},
    "mlip": {"common"},
    "patchrank": {"common"},
    "benchmarks": {"common", "waveclip", "mlip", "patchrank"},
}


def imported_packages(source: str) -> set[str]:
    """Top-level names of the absolute imports in `source`, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_every_form_of_import_is_read():
    source = "import a.b as x\nfrom c.d import e\nfrom . import f\ndef g():\n    import h, i.j\n"
    assert imported_packages(source) == {"a", "c", "h", "i"}


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no modules"
    others = set(ALLOWED) | {"tests"}
    wrong = {
        str(path.relative_to(ROOT)): sorted(forbidden)
        for path in files
        if (forbidden := imported_packages(path.read_text()) & (others - ALLOWED[package] - {package}))
    }
    assert not wrong, f"{package} may import only {sorted(ALLOWED[package])}"
