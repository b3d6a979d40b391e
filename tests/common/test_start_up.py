"""Starting a command imports what it needs, and nothing that takes as long as torch itself."""

import subprocess
import sys

from PIL import Image

HEAVY = {"lightning", "torchmetrics", "torchvision", "timm", "open_clip", "transformers", "scipy", "torch._dynamo"}
MODULES = (
    "common.deploy.convert, common.deploy.card, common.evaluate.tasks, common.data.lookup, "
    "waveclip.adapted, mlip.model, patchrank.avit, patchrank.dynamicvit, "
    "patchrank.crossget, patchrank.prompted"
)
"""What calibrate, evaluate and convert import for the registered models, beside what classify does."""


def test_a_command_that_trains_nothing_needs_no_lightning(tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    code = f"""
import sys
from common.cli import main
assert main(["classify", {str(tmp_path / "a.png")!r}, "--device", "cpu"]) == 0
import {MODULES}
print(*{HEAVY} & sys.modules.keys(), file=sys.stderr)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert answer.stderr.splitlines()[-1] == "", "these were imported"
    assert "Warning" not in answer.stderr, "a library's remarks about itself are not the user's"
