"""Check what the renderer would only find later: labels, citations and files that the text refers to.

python tools/links.py    exits 1 and names each reference that leads nowhere
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import ROOT

LABEL = re.compile(
    r"^\(([\w-]+)\)=|^:?:?\s*(?:label|name):\s*([\w-]+)|name: ([\w-]+)\}?", re.MULTILINE
)
REFERENCE = re.compile(r"\{(ref|numref|eq|prf:ref|cite|cite:[pt])\}`([^`]+)`")
CODE_CELL = re.compile(r"^```\{code-cell\}.*?^```$", re.MULTILINE | re.DOTALL)
FILE_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def main() -> None:
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in [*(ROOT / "book").rglob("*.md")]
    }
    labels = {
        name for text in texts.values() for found in LABEL.findall(text) for name in found if name
    }
    labels |= {
        name
        for text in texts.values()
        for name in re.findall(r"(?:solution-start|exercise)\} ([\w-]+)", text)
    }
    keys = set(
        re.findall(
            r"^@\w+\{([^,]+),",
            (ROOT / "book" / "references.bib").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    wrong = []
    for path, text in sorted(texts.items()):
        text = CODE_CELL.sub("", text)
        for role, target in REFERENCE.findall(text):
            inner = re.search(r"<([^>]+)>$", target)
            names = [inner[1]] if inner else [name.strip() for name in target.split(",")]
            known = keys if role.startswith("cite") else labels
            wrong += [
                f"{path.relative_to(ROOT)}: {{{role}}} {name!r} leads nowhere"
                for name in names
                if name not in known and name != "genindex"
            ]
        for link in FILE_LINK.findall(text):
            place = ROOT / "notebooks" if path.parent == CHAPTERS else path.parent
            if not (place / link.split("#")[0]).exists():
                wrong.append(f"{path.relative_to(ROOT)}: link to {link!r} leads nowhere")
    readme = ROOT / "README.md"
    if readme.exists():
        links = FILE_LINK.findall(readme.read_text(encoding="utf-8"))
        wrong += [
            f"README.md: link to {link!r} leads nowhere"
            for link in links
            if not (ROOT / link.split("#")[0]).exists()
        ]
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(f"{len(wrong)} references lead nowhere; mend: correct the label, key or path")


if __name__ == "__main__":
    main()
