"""The whole book as one PDF, which headless Chromium prints from the built site.

python tools/pdf.py    write _build/book.pdf and _build/html/book.pdf

The articles of all pages become one document, so links lead to pages of the PDF. Code
that only draws a figure is left out; solutions and all else that is folded stand open.
"""

from __future__ import annotations

import base64
import html
import io
import json
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup
from manuscripts import ROOT
from pypdf import PdfReader


sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "book/_ext")]
from browser import Browser, chromium  # noqa: E402
from pages import link_pdf  # noqa: E402


SITE = ROOT / "_build/html"
STYLE = Path(__file__).with_suffix(".css")
NOT_PRINTED = (
    "script, a.headerlink, .viewcode-link, .sd-btn, "
    ".tag_hide-input:not(.tag_export):has(img) > details, summary[aria-label]"
)
LEFT_OUT = "Code that only draws a figure is left out here. The notebooks have it."
NUMBERS = """for (const link of document.querySelectorAll('#contents a'))
  link.lastChild.innerText = ({pages})[link.hash.slice(1)] || ''"""


def key_of(page: Path, fragment: str) -> str:
    """The id in the document of what a page calls `fragment`."""
    name = page.relative_to(SITE).with_suffix("").as_posix().replace("/", "-")
    return f"{name}--{fragment}" if fragment else name


def article(page: Path, printed: set[Path]) -> str:
    """A page's text, with ids and addresses that hold in the one document."""
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    text = soup.find("article", class_="bd-article")
    for unwanted in text.select(NOT_PRINTED):
        unwanted.decompose()
    for plain in text.select("pre span.p, pre span.w, pre span.n, pre span:empty"):
        plain.unwrap()
    for code in text.find_all("pre"):
        if code.get_text().count("\n") < 12:
            code["class"] = "short"
    text.smooth()
    for folded in text.find_all("details"):
        folded["open"] = ""
        if not folded.summary:
            folded.unwrap()
    for tag in text.find_all(id=True):
        tag["id"] = key_of(page, tag["id"])
    for image in text.find_all("img"):
        target = (page.parent / image["src"]).resolve()
        image["src"] = target.relative_to(SITE.resolve()).as_posix()
    for link in text.find_all("a", href=True):
        address = urlsplit(link["href"])
        if address.scheme or address.netloc:
            continue
        target = (page.parent / unquote(address.path)).resolve()
        target = target if address.path else page
        if target in printed:
            link["href"] = "#" + key_of(target, address.fragment)
        else:
            del link["href"]
    text["id"], text.name = key_of(page, ""), "article"
    return str(text)


def document(parts: list[tuple[str, list[Path]]], settings: dict) -> str:
    """The book as one page of HTML that lies beside the site's index."""
    title = html.escape(settings["title"])
    every = {page for _, pages in parts for page in pages}
    # the head of a page with formulas, one folder below the site's index as all are
    heads = (p.read_text(encoding="utf-8") for p in sorted(every))
    head = BeautifulSoup(
        next(t for t in heads if "window.MathJax" in t), "html.parser"
    ).head
    kept = list(head("link", rel="stylesheet"))
    kept += [t for t in head("script") if "mathjax" in str(t).lower()]
    links = "\n".join(str(tag).replace('"../', '"') for tag in kept)
    rows, texts, running = [], [], []
    for caption, pages in parts:
        rows.append(f"<p>{html.escape(caption)}</p>" if caption else "")
        for page in pages:
            body, key = article(page, every), key_of(page, "")
            name = BeautifulSoup(body, "html.parser").h1.get_text(" ", strip=True)
            rows.append(f'<a href="#{key}"><span>{html.escape(name)}</span><b></b></a>')
            texts.append(body)
            name = name.replace("\\", "").replace('"', "\\22 ")
            running.append(f'@page {key} {{ @top-left {{ content: "{name}"; }} }}')
            running.append(f'article[id="{key}"] {{ page: {key}; }}')
    footer = settings.get("html", {}).get("extra_footer", "")
    lines = (
        f'<!DOCTYPE html>\n<html lang="en" data-theme="light"><head>'
        f'<meta charset="utf-8"/><title>{title}</title>\n{links}',
        f"<style>{STYLE.read_text(encoding='utf-8')}\n",
        *running,
        '</style></head>\n<body><div id="book" class="bd-article-container">',
        f'<div id="title"><h1>{title}</h1><p>{html.escape(settings["author"])}</p>'
        f"{footer}<p>{LEFT_OUT}</p></div>",
        '<nav id="contents"><h1>Contents</h1>',
        *rows,
        "</nav>",
        *texts,
        "</div></body></html>",
    )
    return "\n".join(lines)


def contents() -> list[tuple[str, list[Path]]]:
    """(caption, pages) of each part of the site, in its order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = [("", [toc["root"]])]
    for part in toc["parts"]:
        parts.append((part["caption"], [c["file"] for c in part["chapters"]]))
    site = SITE.resolve()
    return [(caption, [site / f"{n}.html" for n in names]) for caption, names in parts]


def printed(browser: Browser) -> bytes:
    """What the browser shows, as a PDF."""
    options = ("printBackground", "preferCSSPageSize", "generateTaggedPDF")
    made = browser.call(
        "Page.printToPDF",
        generateDocumentOutline=True,
        **dict.fromkeys(options, True),
    )
    return base64.b64decode(made["data"])


def write(path: Path, parts: list[tuple[str, list[Path]]]) -> None:
    """Print the parts twice: the first print tells the pages for the contents."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    whole = SITE / "print.html"
    browser = Browser(timeout=300)
    try:
        whole.write_text(document(parts, settings), encoding="utf-8")
        browser.open(whole.resolve().as_uri(), width=800)
        pdf = PdfReader(io.BytesIO(printed(browser)))
        pages = {
            name.lstrip("/"): pdf.get_destination_page_number(place) + 1
            for name, place in pdf.named_destinations.items()
        }
        browser.js(NUMBERS.format(pages=json.dumps(pages)))
        data = printed(browser)
    finally:
        browser.close()
        whole.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main() -> None:
    if not chromium():
        cure = "install the package chromium, or name its program in CHROMIUM"
        sys.exit(f"pdf: no Chromium to print with; {cure}")
    if not (SITE / "book/index.html").exists():
        sys.exit("pdf: no site to print; run `make site`")
    path = ROOT / "_build/book.pdf"
    write(path, contents())
    shutil.copyfile(path, SITE / path.name)
    link_pdf(SITE)
    size = path.stat().st_size / 1e6
    print(f"{path.relative_to(ROOT)}: {size:.1f} MB, linked from the site's first page")


if __name__ == "__main__":
    main()
