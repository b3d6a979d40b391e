"""A module of this suite as a program of one file, with the definitions that it imports from the suite written into it.

So an exported folder runs the code that is tested here, and no function stands twice in this repository.
"""

from __future__ import annotations

import ast
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

_SUITE = ("common",)


def standalone(module: str) -> str:
    """The source of ``module`` and of all that it uses of the suite's modules, dependencies first.

    The modules must import at their top level alone, and what they import from outside must be installed where the
    program runs.
    """
    parts, needs = _Parts(), {}
    main = parts[module]
    for place in range(len(main.body)):
        _take(module, place, parts, needs)
    imports = _import_lines(set().union(*(part.imports() for part in parts.values())))
    head = [ast.get_source_segment(main.source, main.body[0]), "from __future__ import annotations", "\n".join(imports)]
    texts = [f"# From {name}\n\n\n{parts[name].text().strip()}" for name in TopologicalSorter(needs).static_order()]
    return "\n\n".join(head) + "\n\n" + "\n\n\n".join(texts) + "\n"


class _Module:
    """A module's statements, and which of them are taken."""

    def __init__(self, name: str) -> None:
        self.source = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
        self.body = ast.parse(self.source).body
        self.taken: set[int] = set()
        self.places = {name: place for place, node in enumerate(self.body) for name in _defined(node)}

    def imports(self) -> set[tuple[str, str]]:
        """The taken imports from outside the suite: (module or "", what is imported as written)."""
        found = set()
        for node in (self.body[place] for place in self.taken):
            if isinstance(node, ast.Import | ast.ImportFrom) and not _ours(node):
                module = getattr(node, "module", "")
                found |= {(module, ast.unparse(alias)) for alias in node.names if module != "__future__"}
        return found

    def text(self) -> str:
        """The taken definitions as they stand, each with the comments before it."""
        lines, ends = self.source.splitlines(keepends=True), [0, *(node.end_lineno for node in self.body)]
        shown = [place for place in sorted(self.taken) if not isinstance(self.body[place], ast.Import | ast.ImportFrom)]
        # The text after a constant documents it.
        remarks = {place + 1 for place in shown if isinstance(self.body[place], ast.Assign | ast.AnnAssign)}
        shown += [place for place in remarks & set(range(len(self.body))) if isinstance(self.body[place], ast.Expr)]
        return "".join("".join(lines[ends[place] : ends[place + 1]]) for place in sorted({*shown} - {0}))


class _Parts(dict[str, _Module]):
    """Modules by name, each read when it is first asked for."""

    def __missing__(self, name: str) -> _Module:
        self[name] = _Module(name)
        return self[name]


def _take(name: str, place: int, parts: _Parts, needs: dict[str, set[str]]) -> None:
    """Take a statement of a module, and what it uses there and in other modules of the suite.

    needs: module -> the modules that it imports from.
    """
    module = parts[name]
    needs.setdefault(name, set())
    if place in module.taken:
        return
    module.taken.add(place)
    node = module.body[place]
    if _ours(node):
        needs[name].add(node.module)
        source = parts[node.module]
        for alias in node.names:
            _take(node.module, source.places[alias.name], parts, needs)
    for used in {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & module.places.keys():
        _take(name, module.places[used], parts, needs)


def _ours(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _SUITE


def _import_lines(imports: set[tuple[str, str]]) -> list[str]:
    """Import statements, one a module."""
    lines = [f"import {name}" for name in sorted(name for module, name in imports if not module)]
    for module in sorted({module for module, _ in imports if module}):
        lines.append(f"from {module} import {', '.join(sorted(name for other, name in imports if other == module))}")
    return lines


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
