"""The commands of README.md and docs/*.md: their blocks, and (as `python tests/readme.py`) running them.

A fenced `bash` block is to be run as it stands, unless the line before it (blank lines aside) is a comment
such as `<!-- needs: network, gpu -->`, or `make smoke` runs what it says: it is `make reproduce-NAME` alone, or it
stands in a benchmark's table, between `<!-- table: NAME -->` and `<!-- /table -->`, where the benchmark wrote it
because it runs it.
"""

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
        tables = all(re.fullmatch(r"(SMOKE=1 )?make reproduce-\S+", line) for line in self.commands())
        return not (self.needs or self.in_table or tables)

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
    """Run every block that is to be run, from the checkout's root, and end with what failed; 1 if any did."""
    failures = []
    runnable = [(page, block) for page in PAGES for block in blocks(page.read_text()) if block.runs]
    for page, block in runnable:
        start = time.monotonic()
        print(f"--- {page.name}:\n{block.script}", flush=True)
        shell = ["bash", "-euo", "pipefail", "-c", block.script]
        done = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{done.stdout}--- exit code {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            failures.append(f"--- FAILED, {page.name}:\n{block.script}{done.stdout[-2000:]}")
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
