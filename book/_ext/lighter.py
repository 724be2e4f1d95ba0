"""A lighter site: style sheets without what no page uses.

A rule stays if the pages or their scripts name its classes. The font of icons keeps the
icons that a style sheet still names. Notebooks to download are written without spaces.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import tinycss2  # nbconvert brings it
from fontTools import subset  # matplotlib brings it


WORD = re.compile(r"[\w-]+")
SCRIPT = re.compile(r"<script(?![^>]*src)[^>]*>(.*?)</script>", re.DOTALL)
CLASSES = re.compile(r'\b(?:class|id)="([^"]*)"')
ICON = re.compile(r"\\(f[0-9a-f]{3})\b|([\uf000-\uf8ff])")  # as an escape, or itself
LICENCE = re.compile(r"/\*!.*?\*/", re.DOTALL)
ICONS = "vendor/fontawesome/*"


def words_of(site: Path) -> set[str]:
    """Classes and ids of all pages, and every word of their scripts."""
    words = set()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for names in set(CLASSES.findall(text)):
            words.update(names.split())
        for script in SCRIPT.findall(text):
            words.update(WORD.findall(script))
    for script in site.glob("_static/**/*.js"):
        if "mathjax" not in script.parts:
            words.update(WORD.findall(script.read_text(encoding="utf-8")))
    return words


def purge(css: str, words: set[str]) -> str:
    """A style sheet without the selectors whose classes stand in no page or script."""
    begins = tuple(w for w in words if w.endswith("-") and len(w) > 2)  # `bs-${name}`

    def used(selector: list) -> bool:
        for dot, name in zip(selector, selector[1:]):
            if (
                (dot == "." and name.type == "ident")
                and name.value not in words
                and not name.value.startswith(begins)
            ):
                return False
        return True

    def selectors(prelude: list) -> list[list]:
        parts = [[]]
        for token in prelude:
            if token == ",":
                parts.append([])
            else:
                parts[-1].append(token)
        return parts

    def text_of(rules: list) -> str:
        kept = []
        for rule in rules:
            if rule.type == "qualified-rule":
                parts = [p for p in selectors(rule.prelude) if used(p)]
                if parts:
                    head = ",".join(tinycss2.serialize(p).strip() for p in parts)
                    kept.append(f"{head}{{{tinycss2.serialize(rule.content).strip()}}}")
            elif rule.type == "at-rule" and rule.at_keyword in ("media", "supports"):
                inner = text_of(tinycss2.parse_rule_list(rule.content, True, True))
                if inner:
                    head = tinycss2.serialize(rule.prelude).strip()
                    kept.append(f"@{rule.at_keyword} {head}{{{inner}}}")
            else:
                kept.append(rule.serialize())
        return "\n".join(kept)

    return text_of(
        tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
    )


def make_lighter(site: Path) -> None:
    """Purge a finished site's style sheets and font of icons; shorten its notebooks."""
    words, icons = words_of(site), set()
    for path in site.glob("_static/**/*.css"):
        css = path.read_text(encoding="utf-8")
        shorter = "\n".join([*LICENCE.findall(css), purge(css, words)])
        if path.parent.parent.match(ICONS):
            # one font of the four is used, and a browser that reads woff2 reads ttf
            faces = re.findall(r"@font-face\s*{[^}]*}", shorter)
            for face in faces:
                solid = re.search(r"Awesome\\? 6 Free.*fa-solid", face, re.DOTALL)
                one = re.sub(r"url\([^)]*woff2\)\s*format\([^)]*\),?", "", face)
                shorter = shorter.replace(face, one if solid else "")
        icons |= {chr(int(a, 16)) if a else b for a, b in ICON.findall(shorter)}
        path.write_text(shorter, encoding="utf-8")
    for path in site.glob(f"_static/{ICONS}/webfonts/fa-solid-900.ttf"):
        options = subset.Options(layout_features=[], name_IDs=[], hinting=False)
        font = subset.load_font(str(path), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(text="".join(icons))
        subsetter.subset(font)
        subset.save_font(font, str(path), options)
    for path in site.glob("_sources/**/*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        short = json.dumps(notebook, ensure_ascii=False, separators=(",", ":"))
        path.write_text(short, encoding="utf-8")


def take_new_styles(app) -> None:
    """Let this build copy the style sheets again, whole."""
    for path in Path(app.outdir).glob("_static/**/*.css"):
        path.unlink()
