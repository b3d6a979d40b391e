"""The commands of README.md and docs/*.md: their blocks, and (as `python tests/readme.py`) running them.

A fenced `bash` block is to be run as it stands, unless the line before it (blank lines aside) is a comment
such as `<!-- needs: network, gpu -->`.
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

_BLOCK = re.compile(
    r"(?:<!--\s*needs:(?P<needs>[^>]*?)-->[ \t]*\n\s*)?^```bash[ \t]*\n(?P<script>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One `bash` block: its script, and what it needs that CI has not (empty: CI runs it)."""

    script: str
    needs: frozenset[str]

    def commands(self) -> list[str]:
        """The commands, one string each: continued lines joined, comments and blank lines left out."""
        lines = re.sub(r"\\\n\s*", "", self.script).splitlines()
        stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
        return [line for line in stripped if line]


def blocks(text: str) -> list[Block]:
    """The `bash` blocks of the Markdown `text`, in order."""
    return [
        Block(match["script"], frozenset(word.strip() for word in (match["needs"] or "").split(",")) - {""})
        for match in _BLOCK.finditer(text)
    ]


def main() -> int:
    """Run every block that needs nothing special from the checkout's root; 1 if any failed."""
    failed = 0
    runnable = [(page, block) for page in PAGES for block in blocks(page.read_text()) if not block.needs]
    for page, block in runnable:
        start = time.monotonic()
        print(f"--- {page.name}:\n{block.script}", flush=True)
        code = subprocess.run(["bash", "-euo", "pipefail", "-c", block.script], cwd=ROOT, env=os.environ).returncode
        print(f"--- exit code {code} after {time.monotonic() - start:.0f} s", flush=True)
        failed += code != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
