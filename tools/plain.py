"""Plain Markdown for whoever opens a notebook where no Sphinx is: JupyterLab, VS Code, GitHub.

The manuscript's MyST becomes what all of these render. Numbers equal the site's.

python tools/plain.py    check every manuscript and page; one line for each mistake
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat


sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import (
    BOOK,
    NOT_PLAIN,
    NOTEBOOKS,
    PACKAGE,
    ROOT,
    Chapter,
    chapters,
    pages,
)


FENCE = re.compile(r"(?P<mark>`{3,}|:{3,})(?:\{(?P<name>[\w:-]+)\})?(?P<title>.*)")
LABEL = re.compile(r"\(([\w-]+)\)=")
OPTION = re.compile(r":([\w-]+):(.*)")
ROLE_OR_CODE = re.compile(
    r"\{([a-z][a-z:]*)\}`([^`]+)`|(`+)(?!`).+?(?<!`)\3(?!`)", re.S
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")
BOXES = {"note": "Note", "tip": "Tip", "warning": "Warning", "important": "Important"}
# what a reader must never meet in a notebook
RAW = re.compile(
    r"\{(?:ref|cite[a-z:]*|numref|eq|doc|term|math|py:\w+|exercise[a-z-]*|solution[a-z-]*|figure"
    r"|note|tip|admonition|dropdown)\}|^\([\w-]+\)=$|^:{3,}|^:(?:label|class|name|alt):",
    re.MULTILINE,
)


def raw_constructs(notebook: nbformat.NotebookNode) -> int:
    texts = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    return sum(len(RAW.findall(re.sub(r"`[^`\n{]*`", "", text))) for text in texts)


@dataclass(frozen=True)
class Target:
    """What a label stands for."""

    kind: str  # section, figure, equation, exercise
    page: Chapter
    place: str  # file:line
    title: str = ""
    number: str = ""
    first: bool = False  # the page's own title


def fences(rows: list[str]) -> list[tuple[int, int, re.Match]]:
    """(first row, last row, opening line) of every outermost fence; last is -1 if not closed."""
    found, i = [], 0
    while i < len(rows):
        if opened := FENCE.fullmatch(rows[i]):
            mark = opened["mark"]
            closed = re.compile(f"{mark[0]}{{{len(mark)},}} *")
            ends = (j for j in range(i + 1, len(rows)) if closed.fullmatch(rows[j]))
            found.append((i, next(ends, -1), opened))
            i = max(i, found[-1][1])
        i += 1
    return found


def options_of(body: list[str]) -> tuple[dict[str, str], list[str]]:
    options = {}
    while body and (found := OPTION.fullmatch(body[0])):
        options[found[1]], body = found[2].strip(), body[1:]
    return options, body


@cache
def targets() -> tuple[dict[str, Target], list[str]]:
    """Every label of the book, and a line for each that is used twice."""
    labels, problems = {}, []
    for page in (*chapters(), *pages()):
        counts, first = {}, True

        def add(label, kind, line, title="", page=page, counts=counts, first=False):
            number = ""
            if kind != "section":
                counts[kind] = counts.get(kind, 0) + 1
                number = f"{page.label}.{counts[kind]}".strip(".")
            if label in labels:
                problems.append(
                    f"{page.at(line)}: label {label!r} is used twice, first in {labels[label].place}"
                )
            elif label:
                labels[label] = Target(kind, page, page.at(line), title, number, first)

        def scan(rows, line, add=add):
            nonlocal first
            inner = fences(rows)
            covered = {j for i, end, _ in inner for j in range(i, max(i, end) + 1)}
            for i, row in enumerate(rows):
                if i in covered:
                    for a, end, opened in inner:
                        if a == i and opened["name"]:
                            options, _ = options_of(rows[a + 1 : end])
                            label = options.get("label") or options.get("name", "")
                            kind = {"math": "equation"}.get(
                                opened["name"], opened["name"]
                            )
                            if (
                                kind == "exercise"
                                or label
                                and kind in ("equation", "figure")
                            ):
                                add(label, kind, line + i, opened["title"].strip())
                            if kind not in ("math", "glossary"):
                                scan(rows[a + 1 : end], line + a + 1)
                elif found := LABEL.fullmatch(row.strip()):
                    title = next((r for r in rows[i + 1 :] if r.strip()), "")
                    add(found[1], "section", line + i, title.lstrip("# "), first=first)
                elif row.startswith("#"):
                    first = False

        for cell, line in zip(page.notebook.cells, page.lines, strict=True):
            if cell.cell_type == "markdown":
                scan(cell.source.split("\n"), line)
            elif name := cell.metadata.get("mystnb", {}).get("figure", {}).get("name"):
                add(name, "figure", line)
    return labels, problems


@cache
def bibliography() -> dict[str, tuple[str, str, str, str]]:
    """key -> (authors as cited, year, address or '', title)."""
    from pybtex.database import parse_file
    from pybtex.richtext import Text

    entries = {}
    for key, entry in parse_file(str(BOOK / "references.bib")).entries.items():
        people = entry.persons.get("author") or entry.persons.get("editor") or []
        names = [
            str(Text.from_latex(" ".join(p.prelast_names + p.last_names)))
            for p in people
        ]
        who = names[0] if names else key
        if len(names) == 2 and names[1] != "others":
            who = " and ".join(names)
        elif len(names) > 1:
            who += " et al."
        fields = entry.fields
        every = " ".join(str(fields[name]) for name in fields)
        url = fields.get("url") or next(
            iter(re.findall(r"https?://[^\s}]+", every)), ""
        )
        if fields.get("doi"):
            url = "https://doi.org/" + fields["doi"]
        elif not url and (arxiv := re.search(r"arXiv:(\d{4}\.\d+)", every)):
            url = "https://arxiv.org/abs/" + arxiv[1]
        title = str(Text.from_latex(fields.get("title", ""))).replace('"', "'")
        entries[key] = (who, fields.get("year", "n.d."), url, title)
    return entries


@cache
def terms() -> frozenset[str]:
    glossary = BOOK / "glossary.md"
    text = glossary.read_text(encoding="utf-8") if glossary.exists() else ""
    return frozenset(re.findall(r"^(\S.*)\n  ", text, re.MULTILINE))


class Plain:
    """Turns the cells of one manuscript, from the first to the last, into plain ones."""

    def __init__(self, page: Chapter) -> None:
        self.page = page
        self.folder = (
            (NOTEBOOKS / page.notebook_path).parent if page.label else NOTEBOOKS
        )
        self.sources = (
            self.folder if page.label else BOOK
        )  # what its own links start from
        self.solution = ""  # number of the exercise whose solution is open
        self.problems: list[str] = []

    def problem(self, line: int, message: str) -> str:
        self.problems.append(f"{self.page.at(line)}: {message}")
        return ""

    def path_to(self, target: Path) -> str:
        return Path(os.path.relpath(target, self.folder)).as_posix()

    def link_to(self, target: Target, text: str) -> str:
        page, path = target.page, ""
        if page is not self.page:
            path = self.path_to(
                NOTEBOOKS / page.notebook_path if page.label else page.path
            )
        if target.kind == "section" and not target.first:
            path += "#" + re.sub(r"[`$*]", "", target.title).replace(" ", "-")
        return f"[{text}]({path})" if path else text

    def cite(self, keys: str, line: int, narrative: bool) -> str:
        parts = []
        for key in (key.strip() for key in keys.split(",")):
            if key not in bibliography():
                return self.problem(
                    line, f"citation {key!r} is not in book/references.bib"
                )
            who, year, url, title = bibliography()[key]
            text = f"{who} ({year})" if narrative else f"{who}, {year}"
            parts.append(f'[{text}]({url} "{title}")' if url else text)
        return "; ".join(parts) if narrative else f"({'; '.join(parts)})"

    def role(self, name: str, content: str, line: int) -> str:
        text, aim = re.fullmatch(r"(?:(.*?)\s*<)?(.+?)>?", content, re.S).groups()
        text = (text or "").replace("\n", " ")
        if name in ("cite", "cite:p", "cite:t"):
            return self.cite(content, line, name == "cite:t")
        if name == "math":
            return f"${content}$"
        if name == "term":
            if (aim if text else content) not in terms():
                return self.problem(line, f"term {aim!r} is not in book/glossary.md")
            return f"[{text or content}]({self.path_to(BOOK / 'glossary.md')})"
        if name == "doc":
            target = next(
                (p for p in (*chapters(), *pages()) if p.stem == Path(aim).stem), None
            )
            if target is None:
                return self.problem(line, f"page {aim!r} does not exist")
            return self.link_to(Target("page", target, ""), text or target.title)
        if name.startswith("py:"):
            path = self.path_to(
                PACKAGE.joinpath(*aim.lstrip("~").split(".")[1:-1]).with_suffix(".py")
            )
            return f"[`{text or aim.rpartition('.')[2]}`]({path})"
        if name not in ("ref", "numref", "eq"):
            return self.problem(line, f"role {{{name}}} is unknown")
        if aim in ("genindex", "search"):
            return text or aim
        target = targets()[0].get(aim)
        if target is None:
            return self.problem(line, f"{{{name}}} {aim!r} leads nowhere")
        if name == "eq":
            return self.link_to(target, f"({target.number})")
        numbered = {"figure": "Fig. ", "exercise": "Exercise ", "equation": "Equation "}
        own = (
            numbered.get(target.kind, "") + target.number
            if target.number
            else target.title
        )
        return self.link_to(target, text.replace("%s", target.number) or own)

    def inline(self, text: str, line: int) -> str:
        """Roles in running text, and links, which are looked up."""

        def replace(found):
            here = line + text.count("\n", 0, found.start())
            return self.role(found[1], found[2], here) if found[1] else found[0]

        def look_up(found):
            path = self.sources / found[1]
            if not path.exists() and not path.with_suffix(".md").exists():
                here = line + text.count("\n", 0, found.start())
                self.problem(here, f"link to {found[1]!r} leads nowhere")
            return found[0] if self.page.label else "](" + self.path_to(path)

        return ROLE_OR_CODE.sub(replace, LINK.sub(look_up, text))

    def directive(self, name: str, title: str, body: list[str], line: int) -> str:
        options, rest = options_of(body)
        first = line + 1 + len(body) - len(rest)
        target = targets()[0].get(options.get("label") or options.get("name", ""))
        number = target.number if target else ""
        if name == "math":
            tag = f" \\tag{{{number}}}" if number else ""
            return (
                "\n".join(["$$", *(r for r in [title, *rest] if r.strip())])
                + f"{tag}\n$$"
            )
        if name == "solution-start":
            target = targets()[0].get(title)
            self.solution = target.number if target else "?"
            return (
                f"\0{self.solution}"
                if target
                else self.problem(line, f"exercise {title!r} does not exist")
            )
        if name == "solution-end":
            self.solution = ""
            return "\0"
        title = self.inline(title, line)
        if name == "glossary":
            return re.sub(
                r"^(\S.*)\n  ",
                r"**\1**: ",
                self.inline("\n".join(rest), first),
                flags=re.M,
            )
        inner = self.convert("\n".join(rest), first).strip()
        if name == "exercise":
            return f"**Exercise {number}: {title}**\n\n{inner}"
        if name == "dropdown":
            return f"<details>\n<summary>{title}</summary>\n\n{inner}\n\n</details>"
        if name in BOXES or name == "admonition":
            return f"**{BOXES.get(name, title)}.** {inner}".replace("\n", "\n> ").join(
                ["> ", ""]
            )
        if name == "figure":
            self.inline(f"]({title})", line)
            image = f"![{options.get('alt', '')}]({self.path_to(self.sources / title)})"
            return f"{image}\n\n{self.caption(number, inner)}"
        return self.problem(line, f"directive {{{name}}} is unknown")

    def caption(self, number: str, text: str) -> str:
        return f"**Fig. {number}** {text}" if number else text

    def convert(self, text: str, line: int) -> str:
        """Markdown that begins on a line of the manuscript, in plain Markdown."""
        rows, parts, done = text.split("\n"), [], 0
        for first, last, opened in [*fences(rows), (len(rows), len(rows), None)]:
            between = [r for r in rows[done:first] if not LABEL.fullmatch(r.strip())]
            labels = first - done - len(between)
            parts.append(self.inline("\n".join(between), line + done + labels))
            done = last + 1
            if last < 0:
                self.problem(line + first, f"{opened[0]!r} is never closed")
                break
            if opened and opened["name"]:
                body = rows[first + 1 : last]
                parts.append(
                    self.directive(
                        opened["name"], opened["title"].strip(), body, line + first
                    )
                )
            elif opened:
                parts.append("\n".join(rows[first : last + 1]))
        return "\n".join(parts)

    def markdown(self, text: str, line: int) -> str:
        """A whole text cell, with what belongs to a solution folded."""
        before = f"\0{self.solution}\n" if self.solution else ""
        text = before + self.convert(text, line) + ("\n\0" if self.solution else "")

        def fold(found):
            if not found[2].strip():
                return ""
            more = ", continued" if before and found.start() == 0 else ""
            summary = f"Solution of exercise {found[1]}{more}"
            return f"<details>\n<summary>{summary}</summary>\n\n{found[2].strip()}\n\n</details>"

        text = re.sub(r"\0(\S+)\n(.*?)\0", fold, text, flags=re.DOTALL)
        return re.sub(r"\n{3,}", "\n\n", text.replace("\0", "")).strip()


def plain_cells(page: Chapter) -> tuple[list[nbformat.NotebookNode], list[str]]:
    """The page's cells in plain Markdown, hidden ones folded, and a line for each mistake."""
    plain, cells = Plain(page), []

    def add(source):
        if source:
            cells.append(nbformat.v4.new_markdown_cell(source))

    for cell, line in zip(page.notebook.cells, page.lines, strict=True):
        if cell.cell_type != "code":
            add(plain.markdown(cell.source, line))
            continue
        tags = cell.metadata.get("tags", [])
        made = nbformat.v4.new_code_cell(
            cell.source, metadata={"tags": tags} if tags else {}
        )
        folded = plain.solution or "hide-cell" in tags
        hidden = {
            "source_hidden": folded or "hide-input" in tags,
            "outputs_hidden": folded or "hide-output" in tags,
        }
        if any(hidden.values()):
            made.metadata["jupyter"] = {name: True for name, on in hidden.items() if on}
        if "export" in tags:
            path = page.module_path
            add(
                f"*goes into* [`{path.relative_to(ROOT).as_posix()}`]({plain.path_to(path)})"
            )
        cells.append(made)
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        target = targets()[0].get(figure.get("name"))
        add(
            plain.caption(
                target.number if target else "",
                plain.inline(figure.get("caption", ""), line),
            )
        )
    return cells, plain.problems


def main() -> None:
    problems = list(targets()[1])
    for page in (*chapters(), *pages()):
        if page.stem not in NOT_PLAIN:
            problems += plain_cells(page)[1]
    problems += [
        f"README.md: link to {link!r} leads nowhere"
        for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if not (ROOT / link).exists()
    ]
    for path in sorted(NOTEBOOKS.rglob("*.ipynb")):
        count = raw_constructs(nbformat.read(path, as_version=4))
        if count and ".ipynb_checkpoints" not in path.parts:
            problems.append(
                f"{path.relative_to(ROOT)}: {count} marks that only Sphinx reads; run `make weave`"
            )
    print(
        "\n".join(problems) or "manuscripts and pages: every reference leads somewhere"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
