"""The front page's picture and text, from the cells of chapter 14 tagged `front`.

python tools/front.py            write book/_static/front.png and front.md
python tools/front.py --check    exit 1 if they are not those of the stored notebook
"""

from __future__ import annotations

import base64
import sys
import textwrap
from pathlib import Path

import nbformat
from manuscripts import BOOK, NOTEBOOKS


STATIC = BOOK / "_static"


def main() -> None:
    wanted: dict[Path, bytes] = {}
    notebook = nbformat.read(NOTEBOOKS / "14_pretraining.ipynb", as_version=4)
    for cell in notebook.cells:
        if "front" not in cell.metadata.get("tags", []):
            continue
        for output in cell.outputs:
            if "text" in output:
                lines = [line.strip() for line in output.text.splitlines()]
                lines = [part for line in lines for part in textwrap.wrap(line, 76)]
                text = "\n".join(["```text", *lines, "```", ""])
                wanted[STATIC / "front.md"] = text.encode()
            elif "image/png" in output.get("data", {}):
                image = base64.b64decode(output.data["image/png"])
                wanted[STATIC / "front.png"] = image
    if len(wanted) != 2:
        sys.exit("front: chapter 14 has no text and figure tagged `front`; weave it")
    for path, content in wanted.items():
        if path.exists() and path.read_bytes() == content:
            continue
        if "--check" in sys.argv:
            sys.exit(f"front: {path.name} is out of date; mend: run `make weave`")
        path.write_bytes(content)


if __name__ == "__main__":
    main()
