"""What the pages around the chapters say is what their programs print."""

import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.S)


def test_negative_results_follow_from_the_ledger():
    text = (ROOT / "book" / "what_did_not_work.md").read_text(encoding="utf-8")
    ((program, shown),) = BLOCK.findall(text)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == shown.split(), done.stderr
