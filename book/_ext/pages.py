"""Sphinx extension: what the theme leaves to do on the finished site.

Scripts that the theme adds twice, or that would ask another machine, are left out.
Every page gets a description and a picture for those who share its address. Files that
no page loads are deleted: most of MathJax, source maps, fonts of older formats.
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

from docutils import nodes
from lighter import make_lighter, take_new_styles


# of MathJax what `mathjax3_config` names: no menu, and no TeX beyond amsmath
MATHJAX = (
    "startup.js",
    "core.js",
    "input/tex-base.js",
    "input/tex/extensions/ams.js",
    "output/chtml.js",
    "output/chtml/fonts/tex.js",
    "output/chtml/fonts/woff-v2",
    "a11y/assistive-mml.js",
)
UNUSED = (
    "mathjax/output/chtml/fonts/woff-v2/*_Fraktur-*",
    "mathjax/output/chtml/fonts/woff-v2/*_SansSerif-*",
    "mathjax/output/chtml/fonts/woff-v2/*_Script-*",
    "styles/*.map",
    "scripts/*.map",
    "locales",
    "sphinx-thebe.*",
    "*.html",
)
UNUSED_FONTS = (
    "js",
    "scss",
    "less",
    "webfonts/*.woff2",
    "webfonts/fa-[brv]*",
)  # solid stays
# spans that pygments.css gives the colour of plain code: a fifth of a page of code
PLAIN_CODE = re.compile(r'<span class="(?:n|nn|nx|p|pm|w)">([^<]*)</span>')
PLAIN_WORD = re.compile(
    r'<span class="(?:pre|sig-paren|sig-return-icon)">([^<]*)</span>'
)
TOOLTIP = re.compile(r'(href="[^"]*#(gptlib[\w.]*)") title="\2"')  # repeats its link
COLOUR = re.compile(r"\.highlight \.(\w+)\s*\{([^}]*)\}")
CODE = re.compile(r'<span class="(\w{1,2})">')
NEIGHBOURS = re.compile(r'(<span class="\w{1,2}">)([^<]*)</span>(\s*)\1')
AS_WRITTEN = re.compile(r"(<pre.*?</pre>|<script.*?</script>)", re.DOTALL)
INDENT = re.compile(r"\n\s+")
FONT_SCRIPT = re.compile(r'\s*<script src="[^"]*fontawesome[^"]*\.js[^"]*"></script>')
CONTENT_ID = re.compile(r'<section id="((?:exercise|solution)-content)">')
MATH = re.compile(r'class="[^"]*\bmath\b')
MATH_SCRIPT = re.compile(
    r"\s*<script>window\.MathJax.*?</script>|\s*<script [^>]*mathjax[^>]*></script>"
)
THEBE_STYLE = re.compile(r"\s*<link [^>]*sphinx-thebe[^>]*>")
FONT_PRELOAD = re.compile(r'\s*<link rel="preload" as="font"[^>]*>')


def description_of(doctree: nodes.document | None) -> str:
    """The page's first paragraphs, cut after about 160 characters."""
    text = ""
    for paragraph in doctree.findall(nodes.paragraph) if doctree else ():
        text = f"{text} {' '.join(paragraph.astext().split())}".strip()
        if len(text) > 80:
            break
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."


def address_of_picture(config) -> str:
    """The front page's figure, absolute as og:image must be; '' without an address."""
    options = config.html_theme_options
    if config.html_baseurl:
        return config.html_baseurl.rstrip("/") + "/_static/front.png"
    if url := options.get("repository_url"):
        branch = options.get("repository_branch") or "main"
        return f"{url.rstrip('/')}/raw/{branch}/book/_static/front.png"
    return ""


def part_of_mathjax(app, config) -> None:
    """Load MathJax by its parts; sphinx-mathjax-offline names the whole of it."""
    config.mathjax_path = "mathjax/startup.js"


def launch_from_a_repository(app, config) -> None:
    """Leave the launch buttons out where there is nothing to launch."""
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options.pop("launch_buttons", None)


def prepare_page(app, pagename, templatename, context, doctree) -> None:
    kept, seen = [], set()
    for script in context.get("script_files", ()):
        body = getattr(script, "attributes", {}).get("body") or ""
        name = body or str(getattr(script, "filename", script))
        if "thebe" not in name.lower() and name not in seen:
            kept.append(script)
        seen.add(name)
    context["script_files"] = kept
    title = re.sub(r"<[^>]*>", "", context.get("title") or app.config.html_title)
    tags = {"og:title": html.unescape(title), "og:type": "article"}
    text = description_of(doctree)
    if text:
        tags["og:description"] = text
    if picture := address_of_picture(app.config):
        tags["og:image"] = picture
    lines = [
        f'<meta property="{k}" content="{html.escape(v)}"/>' for k, v in tags.items()
    ]
    if text:
        lines.append(f'<meta name="description" content="{html.escape(text)}"/>')
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_only(folder: Path, kept: tuple[str, ...]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(
            name == k or name.startswith((f"{k}/", f"{k}.")) for k in kept
        ):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def names_of_colours(styles: str) -> dict[str, str]:
    """For each class of code the first one that has its colours, in both themes."""
    colours: dict[str, list[str]] = {}
    for name, colour in COLOUR.findall(styles):
        colours.setdefault(name, []).append(colour)
    first: dict[tuple, str] = {}
    return {name: first.setdefault(tuple(c), name) for name, c in colours.items()}


def prune(app, exception) -> None:
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    keep_only(static / "mathjax", MATHJAX)
    for pattern in UNUSED:
        for path in static.glob(pattern):
            delete(path)
    for pattern in UNUSED_FONTS:
        for path in static.glob(f"vendor/fontawesome/*/{pattern}"):
            delete(path)
    names = names_of_colours((static / "pygments.css").read_text(encoding="utf-8"))

    def named(found: re.Match) -> str:
        return f'<span class="{names.get(found[1], found[1])}">'

    # The icons' font does what the script of 1.4 MB does a second time.
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        shorter = text
        for unused in (FONT_PRELOAD, FONT_SCRIPT, THEBE_STYLE):
            shorter = unused.sub("", shorter)
        if not MATH.search(shorter):
            shorter = MATH_SCRIPT.sub("", shorter)
        for plain in (PLAIN_WORD, PLAIN_CODE, TOOLTIP):
            shorter = plain.sub(r"\1", shorter)
        shorter, again = CODE.sub(named, shorter), 1
        while again:  # neighbours of one colour need one mark
            shorter, again = NEIGHBOURS.subn(r"\1\2\3", shorter)
        parts = AS_WRITTEN.split(shorter)
        parts[::2] = [INDENT.sub("\n", part) for part in parts[::2]]
        shorter = "".join(parts)
        # one name for every exercise of a page is no name
        shorter = CONTENT_ID.sub(r'<section class="\1">', shorter)
        if page.name == "index.html" and "<title>" not in text and len(text) < 200:
            shorter = redirect(app.config.html_title, text)
        if shorter != text:
            page.write_text(shorter, encoding="utf-8")
    make_lighter(Path(app.outdir))
    link_pdf(Path(app.outdir))


def link_pdf(site: Path) -> None:
    """Name the book's PDF on the first page, if `make pdf` has put one there."""
    first, line = site / "book/index.html", '<p class="pdf"><a href="../book.pdf">'
    text = first.read_text(encoding="utf-8") if first.exists() else ""
    if (site / "book.pdf").exists() and text and line not in text:
        line += "The whole book as one PDF</a></p>\n"
        place = re.search(r"<section [^>]*>\s*<h2", text).start()  # after the opening
        first.write_text(text[:place] + line + text[place:], encoding="utf-8")


def redirect(title: str, text: str) -> str:
    """The page at the root; jupyter-book writes it without title and link."""
    found = re.search(r"url=([^\"'>\s]+)", text)
    if not found:
        return text
    there, title = found.group(1), html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<title>{title}</title><meta http-equiv="refresh" content="0; url={there}"/>'
        f'</head><body><h1>{title}</h1><p><a href="{there}">To the book</a></p>'
        "</body></html>\n"
    )


def setup(app) -> dict:
    app.connect("config-inited", part_of_mathjax)
    app.connect("config-inited", launch_from_a_repository)
    app.connect("builder-inited", take_new_styles, priority=1)
    app.connect("html-page-context", prepare_page, priority=900)
    app.connect("build-finished", prune, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
