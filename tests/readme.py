"""The commands of README.md and docs/*.md: their blocks, and (as `python tests/readme.py`) running them.

A fenced `bash` block is to be run as it stands, unless the line before it (blank lines aside) is a comment
such as `<!-- needs: network, gpu -->`, or it stands in a benchmark's table, between `<!-- table: NAME -->` and
`<!-- /table -->`: the benchmark wrote it there because it runs it, and `make smoke` runs the benchmark.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"network", "data", "gpu", "time"}

_TABLE = re.compile(r"<!-- table: [a-z0-9-]+ -->.*?<!-- /table -->", re.S)
_BLOCK = re.compile(
    r"(?:<!--\s*needs:(?P<needs>[^>]*?)-->[ \t]*\n\s*)?^```bash[ \t]*\n(?P<script>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One `bash` block: its script, what it needs that CI has not, and whether it stands in a benchmark's table."""

    script: str
    needs: frozenset[str]
    in_table: bool

    @property
    def runs(self) -> bool:
        """Whether CI runs it from the page."""
        return not self.needs and not self.in_table

    def commands(self) -> list[str]:
        """The commands, one string each: continued lines joined, comments and blank lines left out."""
        lines = re.sub(r"\\\n\s*", "", self.script).splitlines()
        stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
        return [line for line in stripped if line]


def blocks(text: str) -> list[Block]:
    """The `bash` blocks of the Markdown `text`, in order."""
    tables = [mark.span() for mark in _TABLE.finditer(text)]
    return [
        Block(
            match["script"],
            frozenset(word.strip() for word in (match["needs"] or "").split(",")) - {""},
            any(start < match.start() < end for start, end in tables),
        )
        for match in _BLOCK.finditer(text)
    ]


def main() -> int:
    """Run every block that is to be run, from the checkout's root; 1 if any failed."""
    failed = 0
    runnable = [(page, block) for page in PAGES for block in blocks(page.read_text()) if block.runs]
    for page, block in runnable:
        start = time.monotonic()
        print(f"--- {page.name}:\n{block.script}", flush=True)
        code = subprocess.run(["bash", "-euo", "pipefail", "-c", block.script], cwd=ROOT, env=os.environ).returncode
        print(f"--- exit code {code} after {time.monotonic() - start:.0f} s", flush=True)
        failed += code != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
