"""Plain Markdown for whoever opens a notebook where no Sphinx is.

The manuscript's MyST becomes what JupyterLab, VS Code, Colab and GitHub render. Numbers
equal the site's.

python tools/plain.py    check manuscripts and pages; one line for each mistake
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from manuscripts import (
    BOOK,
    NOT_PLAIN,
    NOTEBOOKS,
    PACKAGE,
    ROOT,
    Chapter,
    chapters,
    nbformat,
    pages,
)


FENCE = re.compile(r"(?P<mark>`{3,}|:{3,})(?:\{(?P<name>[\w:-]+)\})?(?P<title>.*)")
LABEL = re.compile(r"\(([\w-]+)\)=")
OPTION = re.compile(r":([\w-]+):(.*)")
CODE = r"(`+)(?!`)(?:.+?)(?<!`)\1(?!`)"
ROLE_OR_CODE = re.compile(rf"{CODE}|\{{([a-z][a-z:]*)\}}`([^`]+)`", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")
KINDS = {"math": "equation", "figure": "figure", "exercise": "exercise"}
BEFORE = {"figure": "Fig. ", "exercise": "Exercise ", "equation": "Equation "}
BOXES = {"note": "Note", "tip": "Tip", "warning": "Warning", "important": "Important"}
RAW = re.compile(  # what a reader must never meet in a notebook
    r"\{(?:ref|cite[a-z:]*|numref|eq|doc|term|math|py:\w+|exercise[a-z-]*|figure|note"
    r"|solution[a-z-]*|tip|admonition|dropdown)\}|^\([\w-]+\)=$|^:{3,}"
    r"|^:(?:label|class|name|alt):",
    re.MULTILINE,
)
Rows = list[str]


def raw_marks(notebook: nbformat.NotebookNode) -> int:
    """How many roles, directives, labels and options its text cells show."""
    texts = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    code = re.compile(r"^```\w*\n.*?^```|(?<!\})`[^`\n]+`", re.MULTILINE | re.DOTALL)
    return sum(len(RAW.findall(code.sub("", text))) for text in texts)


def fences(rows: Rows) -> Iterator[tuple[int, int, re.Match]]:
    """(first row, last row, opening line) of each outermost fence; -1: never closed."""
    i = 0
    while i < len(rows):
        last = i
        if opened := FENCE.fullmatch(rows[i]):
            mark = opened["mark"]
            end = re.compile(f"{mark[0]}{{{len(mark)},}} *")
            rest = range(i + 1, len(rows))
            last = next((j for j in rest if end.fullmatch(rows[j])), -1)
            yield i, last, opened
        i = max(i, last) + 1


def options_of(body: Rows) -> tuple[dict[str, str], Rows]:
    """A directive's `:name: value` lines, and the rest of it."""
    options = {}
    while body and (found := OPTION.fullmatch(body[0])):
        options[found[1]], body = found[2].strip(), body[1:]
    return options, body


@dataclass(frozen=True)
class Target:
    """What a label stands for."""

    kind: str  # page, section, figure, equation, exercise
    page: Chapter
    line: int = 1
    title: str = ""
    number: str = ""


def marks(rows: Rows, line: int) -> Iterator[tuple[int, str, str, str]]:
    """(line, kind, label or '', title) of all that has a label or a number."""
    between = set(range(len(rows)))
    for first, last, opened in fences(rows):
        between -= set(range(first, last + 1))
        options, _ = options_of(rows[first + 1 : last])
        label = options.get("label") or options.get("name", "")
        if opened["name"] in KINDS:
            yield line + first, KINDS[opened["name"]], label, opened["title"].strip()
        if opened["name"] not in (None, "math"):
            yield from marks(rows[first + 1 : last], line + first + 1)
    for i in sorted(between):
        if found := LABEL.fullmatch(rows[i].strip()):
            title = next((row for row in rows[i + 1 :] if row.strip()), "")
            kind = "page" if title.startswith("# ") else "section"
            yield line + i, kind, found[1], title.lstrip("# ")


@cache
def targets() -> tuple[dict[str, Target], list[str]]:
    """Every label of the book, and a line for each that is used twice."""
    labels: dict[str, Target] = {}
    problems = []
    for page in (*chapters(), *pages()):
        found, counts = [], Counter()
        for cell, line in page.cells:
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if cell.cell_type == "markdown":
                found += marks(cell.source.split("\n"), line)
            elif figure.get("name"):
                found.append((line, "figure", figure["name"], ""))
        for line, kind, label, title in sorted(found):
            number = ""
            if kind in KINDS.values() and (label or kind == "exercise"):
                counts[kind] += 1
                number = f"{page.label}.{counts[kind]}".strip(".")
            if label in labels:
                where = labels[label].page.at(labels[label].line)
                problems.append(f"{page.at(line)}: {label!r} is used twice: {where}")
            elif label:
                labels[label] = Target(kind, page, line, title, number)
    return labels, problems


@cache
def bibliography() -> dict[str, tuple[str, str, str, str]]:
    """key -> (authors as cited, year, address or '', title)."""
    from pybtex.database import parse_file
    from pybtex.richtext import Text

    def plain(latex: str) -> str:
        return str(Text.from_latex(latex)).replace('"', "'")

    entries = {}
    for key, entry in parse_file(str(BOOK / "references.bib")).entries.items():
        people = entry.persons.get("author") or entry.persons.get("editor") or []
        names = [plain(" ".join(p.prelast_names + p.last_names)) for p in people]
        who = names[0] if names else key
        if len(names) == 2 and names[1] != "others":
            who = " and ".join(names)
        elif len(names) > 1:
            who += " et al."
        every = " ".join(str(value) for value in entry.fields.values())
        url = re.search(r"https?://[^\s}]+", entry.fields.get("url", "") + " " + every)
        arxiv = re.search(r"arXiv:(\d{4}\.\d+)", every)
        address = url[0] if url else arxiv and "https://arxiv.org/abs/" + arxiv[1]
        if "doi" in entry.fields:
            address = "https://doi.org/" + entry.fields["doi"]
        fields = entry.fields.get("year", "n.d."), address or ""
        entries[key] = (who, *fields, plain(entry.fields.get("title", "")))
    return entries


@cache
def terms() -> frozenset[str]:
    path = BOOK / "glossary.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return frozenset(re.findall(r"^(\S.*)\n  ", text, re.MULTILINE))


class Plain:
    """Turns the text cells of one manuscript, from first to last, into plain ones."""

    def __init__(self, page: Chapter) -> None:
        self.page = page
        self.folder = NOTEBOOKS  # where what is made lies
        if page.label:
            self.folder = (NOTEBOOKS / page.notebook_path).parent
        self.solution = ""  # number of the exercise whose solution is open
        self.problems: list[str] = []

    def problem(self, line: int, message: str) -> str:
        self.problems.append(f"{self.page.at(line)}: {message}")
        return ""

    def path_to(self, target: Path) -> str:
        return Path(os.path.relpath(target, self.folder)).as_posix()

    def link(self, target: Target, text: str) -> str:
        page, path = target.page, ""
        if page is not self.page:
            made = NOTEBOOKS / page.notebook_path if page.label else page.path
            path = self.path_to(made)
        if target.kind == "section":
            path += "#" + re.sub(r"[`$*]", "", target.title).replace(" ", "-")
        return f"[{text}]({path})" if path else text

    def cite(self, keys: str, line: int, narrative: bool) -> str:
        parts = []
        for key in (key.strip() for key in keys.split(",")):
            if key not in bibliography():
                return self.problem(line, f"{key!r} is not in book/references.bib")
            who, year, url, title = bibliography()[key]
            text = f"{who} ({year})" if narrative else f"{who}, {year}"
            parts.append(f'[{text}]({url} "{title}")' if url else text)
        return "; ".join(parts) if narrative else f"({'; '.join(parts)})"

    def role(self, name: str, content: str, line: int) -> str:
        found = re.fullmatch(r"(.*?)\s*<([^<>]+)>", content, re.DOTALL)
        text, aim = found.groups() if found else ("", content)
        if name in ("cite", "cite:p", "cite:t"):
            return self.cite(content, line, name == "cite:t")
        if name == "math":
            return f"${content}$"
        if name == "term":
            if aim not in terms():
                return self.problem(line, f"term {aim!r} is not in book/glossary.md")
            return f"[{text or aim}]({self.path_to(BOOK / 'glossary.md')})"
        if name == "doc":
            every = {page.stem: page for page in (*chapters(), *pages())}
            if (page := every.get(Path(aim).stem)) is None:
                return self.problem(line, f"page {aim!r} does not exist")
            return self.link(Target("page", page), text or page.title)
        if name.startswith("py:"):
            *module, own = aim.lstrip("~").split(".")
            path = PACKAGE.joinpath(*module[1:]).with_suffix(".py")
            if not re.search(rf"^(def|class) {own}\b", self.read(path), re.MULTILINE):
                return self.problem(line, f"{aim!r} is not in gptlib")
            return f"[`{text or own}`]({self.path_to(path)})"
        if name not in ("ref", "numref", "eq"):
            return self.problem(line, f"role {{{name}}} is unknown")
        if (target := targets()[0].get(aim)) is None:
            return self.problem(line, f"{{{name}}} {aim!r} leads nowhere")
        if name == "eq":
            return self.link(target, f"({target.number})")
        own = target.number and BEFORE[target.kind] + target.number
        text = text.replace("%s", target.number)
        return self.link(target, text or own or target.title)

    @staticmethod
    def read(path: Path) -> str:
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def inline(self, text: str, line: int) -> str:
        """Roles in running text, and links, which are looked up."""

        def here(found: re.Match) -> int:
            return line + text.count("\n", 0, found.start())

        def look_up(found: re.Match) -> str:
            path = (self.folder if self.page.label else BOOK) / found[1]
            if not path.exists() and not path.with_suffix(".md").exists():
                self.problem(here(found), f"link to {found[1]!r} leads nowhere")
            return "](" + self.path_to(path)

        def replace(found: re.Match) -> str:
            return self.role(found[2], found[3], here(found)) if found[2] else found[0]

        return ROLE_OR_CODE.sub(replace, LINK.sub(look_up, text))

    def directive(self, name: str, title: str, body: Rows, line: int) -> str:
        options, rest = options_of(body)
        first = line + 1 + len(body) - len(rest)
        target = targets()[0].get(options.get("label") or options.get("name", ""))
        number = target.number if target else ""
        if name == "math":
            tag = f" \\tag{{{number}}}" if number else ""
            rows = [row for row in (title, *rest) if row.strip()]
            return "\n".join(["$$", *rows]) + f"{tag}\n$$"
        if name == "solution-start":
            if title not in targets()[0]:
                return self.problem(line, f"exercise {title!r} does not exist")
            self.solution = targets()[0][title].number
            return f"\0{self.solution}"
        if name == "solution-end":
            self.solution = ""
            return "\0"
        if name == "glossary":
            text = self.inline("\n".join(rest), first)
            return re.sub(r"^(\S.*)\n  ", r"**\1**: ", text, flags=re.MULTILINE)
        if name == "figure":
            self.inline(f"]({title})", line)
            image = (self.folder if self.page.label else BOOK) / title
            shown = f"![{options.get('alt', '')}]({self.path_to(image)})\n\n"
            return shown + caption(number, self.convert("\n".join(rest), first).strip())
        title = self.inline(title, line)
        inner = self.convert("\n".join(rest), first).strip()
        if name == "exercise":
            return f"**Exercise {number}: {title}**\n\n{inner}"
        if name == "dropdown":
            return folded(title, inner)
        if name in BOXES or name == "admonition":
            text = f"**{BOXES.get(name, title)}.** {inner}"
            return "> " + text.replace("\n", "\n> ")
        return self.problem(line, f"directive {{{name}}} is unknown")

    def convert(self, text: str, line: int) -> str:
        """Markdown that begins on a line of the manuscript, in plain Markdown."""
        rows, parts, done = text.split("\n"), [], 0
        for first, last, opened in [*fences(rows), (len(rows), len(rows), None)]:
            between = [
                "" if LABEL.fullmatch(r.strip()) else r for r in rows[done:first]
            ]
            parts.append(self.inline("\n".join(between), line + done))
            done = last + 1
            if last < 0:
                self.problem(line + first, f"{opened[0]!r} is never closed")
                break
            if opened and opened["name"]:
                name, title = opened["name"], opened["title"].strip()
                body = rows[first + 1 : last]
                parts.append(self.directive(name, title, body, line + first))
            elif opened:
                if opened["title"] == "javascript" and self.page.label:
                    path = self.page.script_path
                    name = path.relative_to(ROOT).as_posix()
                    parts.append(f"*goes into* [`{name}`]({self.path_to(path)})\n")
                parts.append("\n".join(rows[first : last + 1]))
        return "\n".join(parts)

    def cell(self, text: str, line: int) -> str:
        """A whole text cell, with what belongs to a solution folded."""
        before = self.solution
        text = self.convert(text, line) + ("\n\0" if self.solution else "")
        if before:
            text = f"\0{before}\n{text}"

        def fold(found: re.Match) -> str:
            more = ", continued" if before and not found.start() else ""
            inner = found[2].strip()
            return folded(f"Solution of exercise {found[1]}{more}", inner) * bool(inner)

        text = re.sub(r"\0(\S+)\n(.*?)\0", fold, text, flags=re.DOTALL)
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def caption(number: str, text: str) -> str:
    return f"**Fig. {number}** {text}" if number else text


def plain_cells(page: Chapter) -> tuple[list[nbformat.NotebookNode], list[str]]:
    """The page's cells in plain Markdown, and a line for each mistake in them.

    Hidden cells and solutions are folded; a line over each exported cell names its
    module, and captions follow their figures.
    """
    plain, cells = Plain(page), []

    def add(source: str) -> None:
        if source:
            cells.append(nbformat.v4.new_markdown_cell(source))

    for cell, line in page.cells:
        if cell.cell_type != "code":
            add(plain.cell(cell.source, line))
            continue
        tags = cell.metadata.get("tags", [])
        if "export" in tags:
            path = page.module_path
            name = path.relative_to(ROOT).as_posix()
            add(f"*goes into* [`{name}`]({plain.path_to(path)})")
        metadata = {"tags": tags} if tags else {}
        cells.append(nbformat.v4.new_code_cell(cell.source, metadata=metadata))
        folds = {"source_hidden": "hide-input", "outputs_hidden": "hide-output"}
        for fold, tag in folds.items():
            if plain.solution or "hide-cell" in tags or tag in tags:
                cells[-1].metadata.setdefault("jupyter", {})[fold] = True
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        target = targets()[0].get(figure.get("name"))
        text = plain.inline(figure.get("caption", ""), line)
        add(caption(target.number if target else "", text))
    return cells, plain.problems


def main() -> None:
    problems = list(targets()[1])
    for page in (*chapters(), *pages()):
        if page.stem not in NOT_PLAIN:
            problems += plain_cells(page)[1]
    for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if not (ROOT / link).exists():
            problems.append(f"README.md: link to {link!r} leads nowhere")
    for path in sorted(NOTEBOOKS.rglob("[0-9W]*.ipynb")):
        if count := raw_marks(nbformat.read(path, as_version=4)):
            problems.append(f"{path.name}: {count} raw marks; mend: run `make weave`")
    print("\n".join(problems) or "every reference leads somewhere")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
