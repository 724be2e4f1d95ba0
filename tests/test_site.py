"""The rendered site: its links and headings, and its pages in a real browser.

The site must have been built (`make site` or `make book`); the second half needs
Chromium, and axe-core where the package `axe-core-python` is installed.
"""

import functools
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pytest
from browser import Browser, chromium
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
PARTS = ("book/*.html", "notebooks/**/*.html")
PAGES = sorted(page for part in PARTS for page in SITE.glob(part))
pytestmark = pytest.mark.skipif(not PAGES, reason="no built site: run `make site`")
in_browser = pytest.mark.skipif(
    not chromium() or not importlib.util.find_spec("websocket"),
    reason="no Chromium, or no websocket-client",
)
PAGE_CHAPTER = "notebooks/15_page.html"
CHAPTER_4 = "notebooks/04_attention.html"
SEARCHES = {
    "weight tying": "notebooks/07_gpt.html#",
    "out of memory": "book/troubleshooting.html#",
    "flash attention": "notebooks/11_speed.html",
}
AXE = importlib.util.find_spec("axe_core_python")
THEMES_OWN = {"region", "label-content-name-mismatch"}  # the theme's, not the book's


class Page(HTMLParser):
    """Anchors, links, headings and pictures of one page."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.headings, self.no_alt = set(), [], 0, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update(filter(None, (attrs.get("id"), attrs.get("name"))))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("img", "script", "link"):
            self.links += filter(None, (attrs.get("src"), attrs.get("href")))
        if tag == "img" and not attrs.get("alt"):
            self.no_alt.append(attrs.get("src"))
        self.headings += tag == "h1" and "onlyprint" not in attrs.get("class", "")


@functools.cache
def page(path: Path) -> Page:
    return Page(path)


def name_of(path: Path) -> str:
    return path.relative_to(SITE).as_posix()


def test_each_page_has_one_title_and_pictures_have_a_text():
    # the theme's page for print repeats the title once, outside of the article
    article = re.compile(r"<article.*?</article>", re.S)
    titles = {
        name_of(p): len(re.findall("<h1", article.search(p.read_text("utf-8"))[0]))
        for p in PAGES
    }
    assert {name: n for name, n in titles.items() if n != 1} == {}
    assert {name_of(p): page(p).no_alt for p in PAGES if page(p).no_alt} == {}


def test_no_internal_link_is_broken():
    broken = []
    for path in sorted(SITE.rglob("*.html")):
        if "_static" in path.parts:
            continue
        for link in page(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            is_page = target.suffix == ".html" and target.is_file()
            known = {"", *page(target).ids} if is_page else {unquote(parts.fragment)}
            if not target.is_file() or unquote(parts.fragment) not in known:
                broken.append(f"{name_of(path)}: {link}")
    assert broken == []


def test_search_index_knows_a_heading_for_what_people_look_for():
    text = (SITE / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    for query, place in SEARCHES.items():
        if not place.endswith("#"):
            continue
        number = index["docnames"].index(place.removesuffix(".html#"))
        titles = [
            title
            for title, places in index["alltitles"].items()
            if any(document == number for document, _ in places)
        ]
        assert any(query in title.lower() for title in titles), (query, titles)


def test_styles_lose_what_no_page_names():
    sys.path.insert(0, str(ROOT / "book/_ext"))
    from lighter import purge

    css = """.a, .b:hover { top: 0 } .c { top: 0 } p > .bs-tip { top: 0 }
        @media print { .c { top: 0 } .a:not(.c) { top: 0 } } @media all { .c { top: 0 } }
        @font-face { font-family: x } #b { top: 0 }"""
    assert purge(css, {"a", "bs-"}).split("\n") == [
        ".a{top: 0}", "p > .bs-tip{top: 0}", "@media print{.a:not(.c){top: 0}}",
        "@font-face { font-family: x }", "#b{top: 0}",
    ]  # fmt: skip


def test_figures_lose_bytes_and_hardly_a_colour(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    from weave import with_palette

    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    figure = plt.figure()
    plt.plot(np.arange(50) ** 2, "o-")
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    before = {p.stem: p.read_bytes() for p in tmp_path.glob("*.png")}
    after = {name: with_palette(data) for name, data in before.items()}
    assert after["transparent"] == before["transparent"]
    assert len(after["figure"]) < 0.6 * len(before["figure"])
    old, new = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        for data in (before["figure"], after["figure"])
    )
    assert np.abs(old - new).max() <= 16


def test_a_fold_says_what_it_holds():
    plain = "code cell (?:source|content|output)"
    found = {name_of(p): re.findall(plain, p.read_text("utf-8")) for p in PAGES}
    assert {name: folds for name, folds in found.items() if folds} == {}


def test_the_site_and_its_pages_are_light():
    files = {path: path.stat().st_size for path in SITE.rglob("*") if path.is_file()}
    files.pop(SITE / "book.pdf", None)  # no page loads it
    assert sum(files.values()) < 15e6
    heavy = {name_of(p): files[p] for p in PAGES if files[p] > 700_000}
    assert heavy == {}


@pytest.fixture(scope="module")
def browser():
    tab = Browser()
    yield tab
    tab.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


LOOKED_AT = [
    "book/index.html",
    "notebooks/00_one_page.html",
    CHAPTER_4,
    "notebooks/08_objective.html",
]


def requested(browser) -> list[str]:
    return [e["request"]["url"] for e in browser.said("Network.requestWillBeSent")]


@in_browser
@pytest.mark.parametrize("name", LOOKED_AT)
def test_page_in_a_browser(browser, site, name):
    if not (SITE / name).exists():
        pytest.skip(f"{name} is not in this site")
    browser.open(site + name, width=390)
    width = browser.js("document.documentElement.scrollWidth")
    assert width <= 390, f"{name} is {width} pixels wide"
    browser.open(site + name, width=1280)
    addresses = requested(browser)
    strangers = [a for a in addresses if not a.startswith((site, "data:", "blob:"))]
    assert strangers == []
    failed = [
        e["response"]["url"]
        for e in browser.said("Network.responseReceived")
        if e["response"]["status"] >= 400
    ]
    assert failed == []
    errors = [
        e["exceptionDetails"]["exception"].get("description")
        for e in browser.said("Runtime.exceptionThrown")
    ]
    assert errors == []


WEIGHTS = "_static/gpt/weights.js"  # the model of chapter 15, which is what it shows


def check_weight(addresses, site) -> None:
    """All that a page loads has at most 1.5 MB before it is compressed."""
    ours = {a.split("?")[0].split("#")[0] for a in addresses if a.startswith(site)}
    sizes = {a: (SITE / a.removeprefix(site)).stat().st_size for a in ours}
    model = sizes.pop(site + WEIGHTS, 0)
    assert sum(sizes.values()) <= 1.5e6, sorted(sizes.items(), key=lambda x: -x[1])[:9]
    assert sum(sizes.values()) + model <= 4e6


CUT = """[...document.querySelectorAll('.bd-article pre')]
  .filter(pre => pre.offsetParent && pre.scrollWidth > pre.clientWidth)
  .map(pre => pre.innerText.split('\\n').sort((a, b) => b.length - a.length)[0])"""


WIDE = """[...document.querySelectorAll('div.math')]
  .filter(m => m.offsetParent && m.scrollWidth > m.clientWidth).map(m => m.innerText)"""
SCALES = """[...document.querySelectorAll('.bd-article img')]
  .map(i => [i.getAttribute('src'), i.clientWidth / i.naturalWidth])
  .filter(([_, scale]) => !(scale > 0.4))"""
TURNED = """[...document.querySelectorAll('.bd-article img')]
  .filter(i => !getComputedStyle(i).filter.includes('invert')).map(i => i.src)"""


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_nothing_is_cut_or_heavy_and_formulas_stand(browser, site, path, width):
    browser.open(site + name_of(path), width, "dark" if width == 390 else "light")
    formulas = browser.js("document.querySelectorAll('span.math, div.math').length")
    shown = browser.js("document.querySelectorAll('mjx-container').length")
    assert shown >= formulas, f"{formulas} formulas, {shown} shown"
    assert shown or name_of(path) != CHAPTER_4
    assert browser.js("document.querySelectorAll('mjx-merror').length") == 0
    check_weight(requested(browser), site)
    icons = (
        """document.fonts.load('900 1em "Font Awesome 6 Free"').then(f => f.length)"""
    )
    assert browser.js(icons) == 1
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js(CUT) == []
    assert browser.js(WIDE) == []
    # labels of 11.5 points at 110 dots to the inch: at 0.4 they have 7 pixels
    assert browser.js(SCALES) == []
    if width == 390:
        assert browser.js(TURNED) == [], "figures are drawn on white"


def click(browser, selector):
    """A real click in the middle of the first element that a selector finds."""
    x, y = browser.js(
        f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
        " const r = e.getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + Math.min(r.height / 2, 12)] })"
        f"(document.querySelector({json.dumps(selector)}))"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        more = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
    time.sleep(0.5)


@in_browser
def test_folds_open_and_close(browser, site):
    browser.open(site + CHAPTER_4)
    folds = {
        ".solution.dropdown button": "document.querySelector('.solution-content')",
        "details.hide > summary": "document.querySelector('details.hide .cell_input')",
    }
    for button, content in folds.items():
        shown = f"{content}.checkVisibility() && {content}.clientHeight > 20"
        for expected in (False, True, False):
            assert browser.js(shown) == expected, button
            click(browser, button)


@in_browser
def test_copy_button_gives_the_code_of_the_cell(browser, site):
    notebook = json.loads((ROOT / "notebooks/04_attention.ipynb").read_text("utf-8"))
    cells = [
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"
    ]
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.open(site + CHAPTER_4)
    click(browser, "section section .tag_export:not(.tag_hide-input) .copybtn")
    copied = browser.js("navigator.clipboard.readText()")
    assert copied.strip() in cells and "def " in copied


@in_browser
def test_download_button_gives_the_plain_notebook(browser, site, tmp_path):
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.open(site + CHAPTER_4)
    browser.call("Browser.setDownloadBehavior", **folder)
    click(browser, ".dropdown-download-buttons > button")
    click(browser, ".btn-download-source-button")
    got, stored = tmp_path / "04_attention.ipynb", ROOT / "notebooks/04_attention.ipynb"
    end = time.monotonic() + 10
    while not got.exists() and time.monotonic() < end:
        time.sleep(0.1)
    notebook = json.loads(got.read_text("utf-8"))
    assert notebook == json.loads(stored.read_text("utf-8"))
    cells = notebook["cells"]
    text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert "{ref}" not in text and "{math}" not in text


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The PDF of two pages, and what pypdf reads in it."""
    pypdf = pytest.importorskip("pypdf")
    sys.path.insert(0, str(ROOT / "tools"))
    import pdf

    pages = [SITE.resolve() / name for name in ("book/setup.html", CHAPTER_4)]
    path = tmp_path_factory.mktemp("pdf") / "book.pdf"
    pdf.write(path, [("Start", pages[:1]), ("The model", pages[1:])])
    reader = pypdf.PdfReader(path)
    return reader, [page.extract_text() for page in reader.pages]


@in_browser
def test_pdf_has_contents_numbers_and_an_outline(printed):
    reader, texts = printed
    assert reader.metadata.title in texts[0] and texts[1].startswith("Contents")
    title = "4. Attention: a weighted average of the past"
    number = int(re.search(title + r"\s*(\d+)", texts[1])[1])
    assert texts[number - 1].startswith(f"{title}\n{number}\n{title[:20]}")
    heads = [text.split("\n")[1] for text in texts[2:]]
    assert heads == [str(n) for n in range(3, len(texts) + 1)]
    names = {entry["/Title"] for entry in reader.outline if isinstance(entry, dict)}
    assert {"Contents", title} <= names
    links = [a for page in reader.pages for a in page.get("/Annots", [])]
    addresses = [a.get_object().get("/A", {}).get("/URI", "") for a in links]
    assert not [a for a in addresses if a.startswith("file:")]


@in_browser
def test_pdf_keeps_code_figures_and_solutions(printed):
    reader, texts = printed
    pages = ["".join(text.split("\n")[2:]) for text in texts]  # without their heads
    bare = re.sub(r"\s", "", "".join(pages))
    notebook = json.loads((ROOT / "notebooks/04_attention.ipynb").read_text("utf-8"))
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    shown = [c for c in code if "hide-input" not in c["metadata"].get("tags", [])]
    lines = [line for c in shown for line in "".join(c["source"]).splitlines()]
    assert len(lines) > 100
    assert [line for line in lines if re.sub(r"\s", "", line) not in bare] == []
    figures = sum("image/png" in o.get("data", {}) for c in code for o in c["outputs"])
    assert sum(len(page.images) for page in reader.pages) >= figures > 0
    assert "SolutiontoExercise4.1" in bare


def test_pdf_is_named_on_the_first_page_only_where_it_is(tmp_path):
    (tmp_path / "book").mkdir()
    page = shutil.copy(SITE / "book/index.html", tmp_path / "book/index.html")
    plain = re.sub('<p class="pdf">.*\n', "", page.read_text(encoding="utf-8"))
    page.write_text(plain, encoding="utf-8")
    sys.path.insert(0, str(ROOT / "book/_ext"))
    from pages import link_pdf

    link_pdf(tmp_path)
    assert page.read_text(encoding="utf-8") == plain
    (tmp_path / "book.pdf").touch()
    link_pdf(tmp_path), link_pdf(tmp_path)
    assert page.read_text(encoding="utf-8").count('href="../book.pdf"') == 1


def test_pdf_without_chromium_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/pdf.py"], capture_output=True, text=True,
        env={**os.environ, "PATH": str(tmp_path), "CHROMIUM": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "install the package chromium" in done.stderr
    assert len(done.stderr.splitlines()) == 1


REPOSITORY = "https://github.com/owner/name"


@pytest.mark.parametrize("setting", ["", REPOSITORY], ids=["alone", "repository"])
def test_one_setting_brings_launch_buttons_and_a_picture(tmp_path, setting):
    for name in ("book", "notebooks", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    toc = "format: jb-book\nroot: book/setup\nchapters: [{file: notebooks/04_attention}]\n"
    (tmp_path / "_toc.yml").write_text(toc)
    config = (ROOT / "_config.yml").read_text("utf-8")
    config = config.replace('url: ""', f'url: "{setting}"')
    (tmp_path / "_config.yml").write_text(config, "utf-8")
    for name in ("gptlib", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "--quiet"]
    done = subprocess.run(
        [*command, str(tmp_path), "--path-output", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    page = tmp_path / "_build/html/notebooks/04_attention.html"
    assert done.returncode == 0 and page.exists(), done.stderr[-2000:]
    found = re.findall(
        r'(?:href|og:image" content)="(https?://[^"]*)', page.read_text("utf-8")
    )
    ours = {a for a in found if re.search("colab|binder|owner", a)}
    wanted = {
        "https://colab.research.google.com/github/owner/name/blob/main/notebooks/04_attention.ipynb",
        "https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/notebooks/04_attention.ipynb",
        "https://github.com/owner/name/raw/main/book/_static/front.png",
    }
    assert ours == (wanted if setting else set())


WHAT_IT_SAYS = "document.querySelector('.gpt-page [role=status]').textContent"


@in_browser
@pytest.mark.parametrize("harm", ["changed", "cut off", "missing"])
def test_a_damaged_weight_file_is_one_line_on_the_page(browser, harm):
    whole = (SITE / WEIGHTS).read_bytes()
    middle = len(whole) // 2
    other = b"B" if whole[middle : middle + 1] == b"A" else b"A"
    bad = {"changed": whole[:middle] + other + whole[middle + 1 :]}
    bad["cut off"] = whole[:middle]

    class Harmed(Quiet):
        def do_GET(self):
            if not self.path.startswith("/" + WEIGHTS):
                super().do_GET()
            elif harm == "missing":
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Type", "text/javascript")
                self.send_header("Content-Length", str(len(bad[harm])))
                self.end_headers()
                self.wfile.write(bad[harm])

    handler = functools.partial(Harmed, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.call("Network.clearBrowserCache")
        browser.open(f"http://127.0.0.1:{server.server_port}/{PAGE_CHAPTER}")
        end = time.monotonic() + 10
        while not browser.js(WHAT_IT_SAYS) and time.monotonic() < end:
            time.sleep(0.1)
        said = browser.js(WHAT_IT_SAYS)
        assert said == {
            "changed": "The weights are damaged (the checksum is wrong). "
            "Get the file again."
        }.get(harm, "The weights cannot be read: the file is missing or not whole.")
        assert browser.js("document.querySelector('.gpt-page .gpt-main').disabled")
    finally:
        server.shutdown()
        server.server_close()


FOUND = "(document.querySelector('.search-summary') || {}).innerText || ''"
HITS = "[...document.querySelectorAll('ul.search li > a')].map(a => a.href)"


@in_browser
@pytest.mark.parametrize("query", SEARCHES)
def test_search_finds_the_section(browser, site, query):
    browser.open(f"{site}search.html?q={query.replace(' ', '+')}")
    end = time.monotonic() + 10
    while "matching" not in browser.js(FOUND) and time.monotonic() < end:
        time.sleep(0.1)
    hits = [hit.removeprefix(site) for hit in browser.js(HITS)[:3]]
    assert any(hit.startswith(SEARCHES[query]) for hit in hits), hits


@in_browser
@pytest.mark.skipif(not AXE, reason="axe-core-python is not installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["book/index.html", CHAPTER_4, "book/notation.html"])
def test_axe_finds_nothing(browser, site, name, theme):
    (script,) = Path(AXE.origin).parent.rglob("axe.min.js")
    browser.open(site + name, theme=theme)
    time.sleep(0.5)  # the theme fades its colours in
    browser.js(script.read_text(encoding="utf-8") + ";1")
    found = browser.js(
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map("
        "v => [v.id, v.nodes.map(n => n.html.slice(0, 120))]))"
    )
    ours = [(rule, nodes[:5]) for rule, nodes in found if rule not in THEMES_OWN]
    assert ours == []
