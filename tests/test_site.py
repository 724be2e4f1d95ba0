"""The rendered site: its links and headings, and its pages in a real browser.

The site must have been built (`make site` or `make book`); the second half needs
Chromium, and axe-core where the package `axe-core-python` is installed.
"""

import functools
import http.server
import importlib.util
import json
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import Browser, chromium


ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
PARTS = ("book/*.html", "notebooks/**/*.html")
PAGES = sorted(page for part in PARTS for page in SITE.glob(part))
pytestmark = pytest.mark.skipif(not PAGES, reason="no built site: run `make site`")
in_browser = pytest.mark.skipif(
    not chromium() or not importlib.util.find_spec("websocket"),
    reason="no Chromium, or no websocket-client",
)
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


def test_the_site_and_its_pages_are_light():
    files = {path: path.stat().st_size for path in SITE.rglob("*") if path.is_file()}
    assert sum(files.values()) < 18e6
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


@in_browser
@pytest.mark.parametrize("name", LOOKED_AT)
def test_page_in_a_browser(browser, site, name):
    if not (SITE / name).exists():
        pytest.skip(f"{name} is not in this site")
    browser.open(site + name, width=390)
    width = browser.js("document.documentElement.scrollWidth")
    assert width <= 390, f"{name} is {width} pixels wide"
    browser.open(site + name, width=1280)
    addresses = [e["request"]["url"] for e in browser.said("Network.requestWillBeSent")]
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
    formulas = browser.js("document.querySelectorAll('span.math, div.math').length")
    shown = browser.js("document.querySelectorAll('mjx-container').length")
    assert shown >= formulas, f"{formulas} formulas, {shown} shown"
    assert shown or name != CHAPTER_4
    assert browser.js("document.querySelectorAll('mjx-merror').length") == 0


CUT = """[...document.querySelectorAll('.bd-article pre')]
  .filter(pre => pre.offsetParent && pre.scrollWidth > pre.clientWidth)
  .map(pre => pre.innerText.split('\\n').sort((a, b) => b.length - a.length)[0])"""


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_code_and_equations_are_whole(browser, site, width):
    browser.open(site + CHAPTER_4, width=width)
    assert browser.js(CUT) == []
    cut = "[...document.querySelectorAll('div.math')].filter(m => "
    assert browser.js(cut + "m.scrollWidth > m.clientWidth).length") == 0


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
