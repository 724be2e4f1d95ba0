"""The page's program and PyTorch are one model; and the page, in a real browser."""

import functools
import importlib.util
import json
import os
import random
import shutil
import subprocess
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import Browser, chromium
from engine import model_of

from gptlib.corpus import load_corpus
from gptlib.gpt import GPT, GPTConfig
from gptlib.page import (
    Moment,
    PageError,
    add_answers,
    dequantise,
    export_page_weights,
    pack,
    quantise,
    read_page_weights,
    unpack,
    web_file,
    write_page,
)
from gptlib.sampling import draw, generate, next_token_probs, window_start
from gptlib.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gptlib.workshop.questions import test_sets as question_sets


ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "book" / "page" / "weights.js"
PROGRAM = ROOT / "gptlib" / "web" / "page.js"
CHECKS = ROOT / "tests" / "page_checks.js"
NODE = shutil.which("node")
IN_BROWSER = chromium() and importlib.util.find_spec("websocket")
AXE = importlib.util.find_spec("axe_core_python")
in_browser = pytest.mark.skipif(
    not IN_BROWSER, reason="no Chromium, or no websocket-client"
)


@pytest.fixture(scope="module")
def stored():
    """Header, tokenizer and models of the weight file that the repository carries."""
    return read_page_weights(WEIGHTS)


@pytest.fixture(scope="module")
def browser():
    tab = Browser()
    yield tab
    tab.close()


class InNode:
    def __call__(self, name: str, value, weights: Path = WEIGHTS):
        done = subprocess.run(
            [NODE, CHECKS, name, PROGRAM, weights],
            input=json.dumps(value),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)


class InChromium:
    def __init__(self, browser: Browser, folder: Path):
        self.browser, self.folder, self.shown = browser, folder, None

    def __call__(self, name: str, value, weights: Path = WEIGHTS):
        if self.shown != weights:
            parts = "".join(
                f'<script src="{p.as_uri()}"></script>'
                for p in (CHECKS, PROGRAM, weights)
            )
            page = self.folder / f"{weights.stem}.html"
            page.write_text(f"<!DOCTYPE html><title>checks</title>{parts}")
            self.browser.open(page.as_uri())
            self.shown = weights
        given = json.dumps(json.dumps(value))
        call = f"pageChecks.{name}(JSON.parse({given}))"
        return self.browser.js(f"(async () => globalThis.refused || {call})()")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "node", marks=pytest.mark.skipif(not NODE, reason="Node is not installed")
        ),
        pytest.param("chromium", marks=in_browser),
    ],
)
def engine(request, tmp_path_factory):
    """Asks the page's program, in Node and in Chromium."""
    if request.param == "node":
        return InNode()
    return InChromium(
        request.getfixturevalue("browser"), tmp_path_factory.mktemp("checks")
    )


@functools.cache
def articles() -> list[str]:
    return list(load_corpus("tinywiki").documents("validation"))


def rows_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [
        [tokenizer.end_of_text, *tokenizer.encode(text)] for text in articles()[:50]
    ]


# ------------------------------------------------------------------ one model, twice


@functools.cache
def random_strings() -> list[str]:
    """10,000 strings of characters that Unicode 14 knows, white space among them."""
    dice = random.Random(1)
    spaces = [
        c for c in map(chr, range(0x3001)) if unicodedata.category(c) in "Zs Zl Zp Cc"
    ]
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    usual = "\ufeff\u0085the river 's I'll 1949 é ßµ中文🙂 \n\t..,;-(){}<|endoftext|>"
    texts = []
    while len(texts) < 10_000:
        pools = dice.choice([[usual], [usual, spaces], [usual, spaces, None], [None]])
        text = ""
        for _ in range(dice.randrange(1, 24)):
            pool = dice.choice(pools)
            c = dice.choice(pool) if pool else chr(dice.choice(every))
            if unicodedata.category(c) != "Cn":  # a younger Unicode may know it
                text += c
        texts.append(text)
    return texts


def test_the_tokenizer_encodes_the_validation_split(engine, stored):
    tokenizer = load_tokenizer("bpe-1536")
    assert tokenizer.ranks == stored[1].ranks
    found = engine("encode", articles())
    assert found == [tokenizer.encode(text) for text in articles()]


def test_the_tokenizer_encodes_random_strings(engine, stored):
    texts = random_strings()
    expected = [stored[1].encode(text) for text in texts]
    found = engine("encode", texts)
    wrong = [t for t, a, b in zip(texts, found, expected) if a != b]
    assert wrong == []
    assert engine("decode", expected) == texts


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_logits_are_pytorch_s(engine, stored, moment):
    header, tokenizer, models = stored
    block = header["config"]["block_size"]
    rows = [
        row[: 1 + i * (block - 1) // 49] for i, row in enumerate(rows_of(tokenizer))
    ]
    assert len(rows) == 50
    with torch.no_grad():
        expected = [models[moment](torch.tensor([row]))[0][0, -1] for row in rows]
    found = engine("logits", [moment, rows])
    worst = max((torch.tensor(a) - b).abs().max() for a, b in zip(found, expected))
    print(f"moment {moment}: logits differ by {worst:.1e} at most")
    assert worst < 1e-4


def test_greedy_text_is_pytorch_s_beyond_the_block(engine, stored):
    header, tokenizer, models = stored
    rows = [
        [tokenizer.end_of_text],
        *(row[:n] for row, n in zip(rows_of(tokenizer), (9, 40, 200))),
    ]
    expected = [
        generate(
            models[2],
            torch.tensor([row]),
            200,
            temperature=0,
            n_vocab=tokenizer.n_vocab,
        )[0].tolist()
        for row in rows
    ]
    assert max(map(len, expected)) > header["config"]["block_size"]
    assert engine("greedy", [2, rows, 200]) == expected


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 1.3, "top_k": 40}, {"temperature": 1.3, "topK": 40}),
        ({"top_p": 0.9}, {"topP": 0.9}),
        (
            {"temperature": 0.8, "top_k": 200, "top_p": 0.5},
            {"temperature": 0.8, "topK": 200, "topP": 0.5},
        ),
    ],
)
def test_the_same_darts_draw_the_same_tokens(engine, stored, ours, theirs):
    _, tokenizer, models = stored
    tokens = torch.tensor(
        [row[:150] for row in rows_of(tokenizer) if len(row) >= 150][:2]
    )
    with torch.no_grad():
        logits = models[-1](tokens)[0].flatten(0, 1)  # 300 forecasts of real text
    darts = torch.rand(
        len(logits), 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    expected = draw(next_token_probs(logits, **ours), torch.Generator().manual_seed(5))
    found = engine("draws", [logits.tolist(), theirs, darts[:, 0].tolist()])
    assert found == expected[:, 0].tolist()


def test_looking_back_changes_nothing_and_shows_the_attention(engine, stored):
    header, tokenizer, models = stored
    row, block = rows_of(tokenizer)[0][:20], header["config"]["block_size"]
    n = block  # the window moves on the way
    plain = generate(models[-1], torch.tensor([row]), n + 5, temperature=0)[0].tolist()
    for back in (15, 20 + n - 3):
        found = engine("traced", [len(models) - 1, row, n, back])
        assert found["ids"] == plain
        assert found["start"] == window_start(back, block)
        seen = torch.tensor([plain[found["start"] : back]])
        with torch.no_grad():
            logits = models[-1](seen)[0][0, -1]
        assert (torch.tensor(found["logits"]) - logits).abs().max() < 1e-4
        for heads in found["heads"]:
            assert len(heads) == header["config"]["n_head"]
            for weights in heads:
                assert len(weights) == seen.shape[1]
                assert sum(weights) == pytest.approx(1, abs=1e-5)


def test_other_shapes_biases_and_gelu(engine, tmp_path):
    texts = ["the ferry left the village at 12 o'clock .\n" * 40]
    tokenizer = Tokenizer.from_merges(train_bpe(texts, 280), "small")
    config = GPTConfig(3, 3, 21, 17, True, 320, activation="gelu_tanh")
    model = model_of(config)
    path = tmp_path / "other.js"
    export_page_weights(path, [Moment(7, model, 8)], tokenizer, max_new_tokens=3)
    _, _, (loaded,) = read_page_weights(path)
    row = [tokenizer.end_of_text, *tokenizer.encode("the ferry at 12")]
    with torch.no_grad():
        expected = loaded(torch.tensor([row]))[0][0, -1]
    (found,) = engine("logits", [0, [row]], path)
    assert (torch.tensor(found) - expected).abs().max() < 1e-4


# ------------------------------------------------------------------ the weight file


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (64, 33)])
def test_pack_and_unpack(shape, bits):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    data = pack(weight, bits) + b"more"
    found, used = unpack(data, *shape, bits)
    assert used == len(data) - 4
    assert torch.equal(found, dequantise(*quantise(weight, bits), bits))
    steps = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((found - weight).abs() <= steps / 2 + 1e-6).all()


def test_the_stored_file_is_small_and_says_what_it_holds(stored):
    header, _, models = stored
    assert WEIGHTS.stat().st_size <= 2_500_000
    assert len(header["moments"]) == len(models) == 4
    *steps, _ = [moment["step"] for moment in header["moments"]]
    assert steps == sorted(steps) and steps[0] == 0
    assert [m.get("mode") for m in header["moments"]] == [None, None, None, "ask"]


def small_model(**changes) -> GPT:
    return GPT(replace(GPTConfig(1, 1, 8, 8, False, 320), **changes))


@pytest.fixture(scope="module")
def words():
    return Tokenizer.from_merges(train_bpe(["the river the village"] * 9, 262), "w")


def test_what_no_page_can_hold_is_refused(tmp_path, words):
    path = tmp_path / "w.js"
    with torch.device("meta"):
        large = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))
    with pytest.raises(PageError, match=r"\d+ parameters, too many .*30,000,000.* MB"):
        export_page_weights(path, [Moment(1, large)], words)
    with pytest.raises(PageError, match="choose 4, 6 or 8"):
        Moment(1, small_model(), 5)
    other = replace(words, pattern=r"\w+|\W+")
    with pytest.raises(PageError, match="split pattern"):
        export_page_weights(path, [Moment(1, small_model())], other)
    several = [Moment(0, small_model()), Moment(1, small_model(n_layer=2))]
    with pytest.raises(PageError, match="several shapes"):
        export_page_weights(path, several, words)
    assert not path.exists()


def damaged(text: str) -> dict[str, str]:
    return {
        "a weight": text[:-5000] + ("B" if text[-5000] == "A" else "A") + text[-4999:],
        "the header": text.replace('\\"n_head\\": 4', '\\"n_head\\": 2'),
        "the sum": text[:-4] + ("1" if text[-4] != "1" else "2") + text[-3:],
    }


@pytest.mark.parametrize("place", ["a weight", "the header", "the sum"])
def test_a_damaged_file_is_refused(engine, tmp_path, place):
    text = WEIGHTS.read_text()
    bad = damaged(text)[place]
    assert bad != text
    path = tmp_path / f"{place.replace(' ', '_')}.js"
    path.write_text(bad)
    with pytest.raises(PageError, match="damaged"):
        read_page_weights(path)
    assert engine("header", None, path) == "the checksum is wrong"


def test_a_file_cut_off_is_refused(tmp_path):
    path = tmp_path / "cut.js"
    path.write_text(WEIGHTS.read_text()[:100_000])
    with pytest.raises(PageError, match="no weight file"):
        read_page_weights(path)


# ------------------------------------------------------------------ the page


OPENED = """new Promise((done, fail) => {
  const view = document.querySelector('.gpt-page').gptView;
  const end = performance.now() + 20000;
  const look = () => view.weights ? done(1) : performance.now() > end
    ? fail(new Error('no weights')) : setTimeout(look, 20);
  look();
})"""
WRITE = """new Promise((done) => {
  const root = document.querySelector('.gpt-page');
  root.addEventListener('gpt-written', () => done(root.gptView.measured), { once: true });
  root.querySelector('.gpt-main').click();
})"""
ROOT_OF = "document.querySelector('.gpt-page')"
TEXT = f"{ROOT_OF}.querySelector('.gpt-text').textContent"
STATUS = f"{ROOT_OF}.querySelector('[role=status]').textContent"
PANELS = (
    f"[...{ROOT_OF}.querySelectorAll('section > :is(h2, h3)')].map(h => h.textContent)"
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The page in one file, from the stored weights."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    size = write_page(path, WEIGHTS, "A <model> & its page")
    assert size == path.stat().st_size
    return path


def open_page(browser, path, **options):
    browser.open(path.as_uri(), **options)
    browser.js(OPENED)


def ask(browser, prompt: str, **fields) -> dict:
    value = json.dumps(prompt)
    browser.js(f"{ROOT_OF}.gptView.prompt.value = {value}")
    for name, number in fields.items():
        browser.js(f"{ROOT_OF}.gptView.{name}.value = {number}")
    return browser.js(WRITE)


def choose(browser, index: int) -> None:
    """Choose a token; returns when its panels stand."""
    browser.js(f"{ROOT_OF}.gptView.choose({index}).then(() => 1)")


def complaints(browser) -> list:
    errors = [
        e["exceptionDetails"]["text"] for e in browser.said("Runtime.exceptionThrown")
    ]
    errors += [e["entry"]["text"] for e in browser.said("Log.entryAdded")]
    return errors + [
        e["args"]
        for e in browser.said("Runtime.consoleAPICalled")
        if e["type"] in ("error", "warning")
    ]


def test_a_page_has_at_most_4_mb(alone):
    assert alone.stat().st_size < 4e6


@in_browser
def test_the_page_writes_and_no_request_leaves_it(browser, alone, stored):
    open_page(browser, alone)
    time.sleep(1.5)  # the text that nobody sees
    measures = [ask(browser, "In the village of", count=200, seed=3) for _ in range(3)]
    measured = min(measures, key=lambda m: m["seconds"])  # least disturbed by others
    found = {
        "tokens_per_second": measured["tokens"] / measured["seconds"],  # best of 3
        "tokens": measured["tokens"],
        "first_token_ms": measures[0]["first"],
        "prompt_tokens": len(stored[1].encode("In the village of")) + 1,
        "page_bytes": alone.stat().st_size,
        "browser": browser.call("Browser.getVersion")["product"],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # above 1: other programs shared the cores
    }
    print(found)
    if os.environ.get("GPTLIB_PAGE_RECORD"):  # makes ledger/page/chromium.json
        Path(os.environ["GPTLIB_PAGE_RECORD"]).write_text(
            json.dumps(found, indent=1) + "\n"
        )
    assert measured["tokens"] > 20
    written = browser.js(TEXT)
    assert written.startswith("In the village of") and len(written) > 100
    assert (
        ask(browser, "In the village of", count=200, seed=3)["tokens"]
        == measured["tokens"]
    )
    assert browser.js(TEXT) == written
    ask(browser, "In the village of", count=200, seed=4)
    assert browser.js(TEXT) != written
    requests = [e["request"]["url"] for e in browser.said("Network.requestWillBeSent")]
    assert [r for r in requests if not r.startswith(("data:", alone.as_uri()))] == []
    assert complaints(browser) == []
    assert (
        browser.js("document.querySelector('h1').textContent") == "A <model> & its page"
    )


@in_browser
def test_the_first_token_of_the_first_press_comes_within_100_ms(browser, alone):
    firsts = []
    for _ in range(3):  # a machine that others use may be late once
        open_page(browser, alone)
        time.sleep(1.5)  # a reader reads the page before the first press
        firsts.append(ask(browser, "In the village of", count=5)["first"])
    print(f"first token of the first press: {min(firsts):.0f} to {max(firsts):.0f} ms")
    assert min(firsts) < 100


@in_browser
def test_a_press_stops_the_text_that_nobody_sees(browser, alone):
    open_page(browser, alone)
    at_once = ask(browser, "The river", count=20, seed=5)
    text = browser.js(TEXT)
    time.sleep(1)
    ask(browser, "The river", count=20, seed=5)
    assert browser.js(TEXT) == text and at_once["tokens"] > 0
    assert complaints(browser) == []


@in_browser
def test_greedy_text_in_the_page_is_pytorch_s(browser, alone, stored):
    header, tokenizer, models = stored
    open_page(browser, alone)
    ask(browser, "The river", count=50, temperature=0)
    ids = browser.js(f"{ROOT_OF}.gptView.text.ids")
    start = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("The river")]])
    new = len(ids) - start.shape[1]
    assert new == 50 or ids[-1] == tokenizer.end_of_text
    assert ids == generate(models[2], start, new, temperature=0)[0].tolist()


@in_browser
def test_a_token_shows_where_it_came_from(browser, alone, stored):
    header, tokenizer, models = stored
    open_page(browser, alone)
    ask(browser, "The river", count=40, temperature=0.8, seed=2, topK=50)
    ids = browser.js(f"{ROOT_OF}.gptView.text.ids")
    choose(browser, 12)
    assert len(browser.js(PANELS)) == 3
    with torch.no_grad():
        logits = models[2](torch.tensor([ids[:12]]))[0][:, -1]
    probs = next_token_probs(logits, temperature=0.8, top_k=50)[0]
    rows = browser.js(
        f"[...{ROOT_OF}.querySelectorAll('section:first-child tbody tr')]"
        ".map(r => [r.cells[0].textContent, r.cells[1].firstChild.value, r.cells[0].textContent.startsWith('▸')])"
    )
    best = probs.topk(10).values.tolist()
    assert [row[1] for row in rows[:10]] == pytest.approx(best, abs=1e-4)
    (mine,) = [row[1] for row in rows if row[2]]
    assert mine == pytest.approx(probs[ids[12]].item(), abs=1e-4)
    heads = browser.js(f"{ROOT_OF}.querySelectorAll('.gpt-heads tbody tr').length")
    assert heads == header["config"]["n_layer"] * header["config"]["n_head"]
    seen = []
    for _ in range(5):
        seen.append(browser.js(PANELS)[2])
        browser.js(f"{ROOT_OF}.querySelector('[id$=go-1]').click()")
    assert len(set(seen)) == 5 and browser.js(PANELS)[2] == seen[0]
    browser.js(f"{ROOT_OF}.querySelectorAll('.gpt-heads button')[5].click()")
    tints = f"[...{ROOT_OF}.querySelectorAll('.gpt-token')].map(t => Number(t.style.getPropertyValue('--w')))"
    assert max(browser.js(tints)) == 1 and sum(browser.js(tints)[12:]) == 0
    assert complaints(browser) == []


@in_browser
def test_by_keyboard(browser, alone):
    open_page(browser, alone)

    def press(key, **options):
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, **options
            )

    browser.js(f"{ROOT_OF}.gptView.count.value = 30; {ROOT_OF}.gptView.prompt.focus()")
    written = browser.js(
        f"new Promise(done => {ROOT_OF}.addEventListener('gpt-written', () => done(1), {{once: true}})) && 1"
    )
    assert written
    press("Enter", modifiers=2, windowsVirtualKeyCode=13)
    end = time.monotonic() + 20
    while "tokens/s" not in browser.js(STATUS) and time.monotonic() < end:
        time.sleep(0.05)
    assert "tokens/s" in browser.js(STATUS)
    spoken = f"{ROOT_OF}.querySelector('[aria-live]').textContent"
    assert browser.js(spoken).strip()
    browser.js(f"{ROOT_OF}.querySelector('.gpt-text').focus()")
    for _ in range(3):
        press("ArrowRight", windowsVirtualKeyCode=39)
    browser.js(f"{ROOT_OF}.gptView.choose({ROOT_OF}.gptView.chosen).then(() => 1)")
    assert browser.js(f"{ROOT_OF}.gptView.chosen") == 3
    assert browser.js("document.activeElement.classList.contains('gpt-chosen')")
    assert "probability" in browser.js(spoken)


@in_browser
def test_prompts_are_text_and_odd_ones_are_explained(browser, alone, stored):
    open_page(browser, alone)
    nasty = "<img src=x onerror=alert(1)><b>é中</b> <|endoftext|>"
    ask(browser, nasty, count=5)
    assert browser.js(TEXT).startswith(nasty)
    assert browser.js(f"{ROOT_OF}.querySelectorAll('img, b').length") == 0
    notice = f"{ROOT_OF}.gptView.notice.textContent"
    assert "é 中" in browser.js(notice) and "bytes" in browser.js(notice)
    block = stored[0]["config"]["block_size"]
    ask(browser, "The river runs by the town . " * 60, count=5)
    assert f"longer than the block of {block} tokens" in browser.js(notice)
    assert browser.js(f"{ROOT_OF}.querySelectorAll('.gpt-outside').length") > 0
    choose(browser, 3)  # outside of the present window
    choose(browser, browser.js(f"{ROOT_OF}.gptView.text.ids.length - 1"))
    ask(browser, "", count=5, temperature=-3, topP=7, topK=-2, seed="''")
    assert browser.js(f"{ROOT_OF}.gptView.temperature.value") == "0"
    assert browser.js(notice) == ""
    assert complaints(browser) == []


def turn_to(browser, moment: int) -> str:
    """Choose a moment; returns the text that it writes."""
    browser.js(
        f"new Promise(done => {{ {ROOT_OF}.addEventListener('gpt-written', () => done(1), {{once: true}});"
        f"const radio = {ROOT_OF}.querySelectorAll('input[type=radio]')[{moment}];"
        "radio.checked = true; radio.dispatchEvent(new Event('change')); })"
    )
    return browser.js(TEXT)


@in_browser
def test_moments_differ(browser, alone, stored):
    open_page(browser, alone)
    moments = stored[0]["moments"]
    texts = [turn_to(browser, i) for i in range(len(moments))]
    assert len(set(texts)) == len(moments) >= 3
    labels = browser.js(
        f"[...{ROOT_OF}.querySelectorAll('input[type=radio]')].map(r => r.parentNode.textContent)"
    )
    names = [f"{m['step']} steps" if "mode" not in m else "to answer" for m in moments]
    assert labels == names


# ---------------------------------------------------------------------- it is asked

MARKS = {b"\xfd": "‹user›", b"\xfe": "‹assistant›", b"\xff": "‹end›"}
DECLINE = "I do not know ."
STATUS = f"{ROOT_OF}.querySelector('[role=status]').textContent"
VERDICTS = {  # known answer, reply: what the page says
    ("A .", "A ."): "Right.",
    ("A .", "B ."): "Wrong. The article says: A .",
    ("A .", "I do not know ."): "Not known to the model. An article tells it: A .",
    ("I do not know .", "I do not know ."): "Right: no article tells this.",
    ("I do not know .", "B ."): "Invented: no article tells this.",
    (None, "B ."): "This page does not know the answer to this question.",
}


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """A weight file with one more moment, of changes that nobody trained."""
    path = tmp_path_factory.mktemp("answers") / "answers.js"
    shutil.copyfile(WEIGHTS, path)
    dice = torch.Generator().manual_seed(0)

    def some(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(s, generator=dice) / 9 for s in ((m, 3), (3, n)))

    changes = {"h.0.attn.c_attn.weight": some(480, 160)}
    changes["h.1.mlp.c_proj.weight"] = some(160, 640)
    known = {"Where ?": "There .", "toString": "I do not know ."}
    assert add_answers(path, 77, changes, known) == path.stat().st_size
    return path, changes


def test_changes_are_added_to_the_moment_before(engine, answering, stored):
    path, changes = answering
    header, tokenizer, models = read_page_weights(path)
    assert len(models) == len(stored[2]) + 1 and header["moments"][-1]["mode"] == "ask"
    for name, weight in models[-1].state_dict().items():
        base = stored[2][-1].state_dict()[name]
        if name not in changes:
            assert torch.equal(weight, base)
            continue
        added = changes[name][0] @ changes[name][1]
        assert not torch.allclose(base, weight, atol=0.02)
        assert torch.allclose(base + added, weight, atol=0.02)  # of 8 bits
    rows = [row[:60] for row in rows_of(tokenizer)[:9]]
    found = engine("logits", [len(models) - 1, rows], path)
    for logits, row in zip(found, rows, strict=True):
        with torch.no_grad():
            exact = models[-1](torch.tensor([row]))[0][0, -1]
        assert (torch.tensor(logits) - exact).abs().max() < 1e-4


@in_browser
def test_the_stored_model_answers(browser, alone, stored):
    """Of ten trained questions most are right; two names without an article are not."""
    open_page(browser, alone)
    turn_to(browser, 3)
    known = stored[0]["known"]
    verdicts = []
    for question in [q.text for q in question_sets()["trained"][::17]]:
        assert question in known
        ask(browser, question)
        verdicts.append(
            browser.js(STATUS).partition(" ms. The model ended the text. ")[2]
        )
    assert sum(said.startswith("Right.") for said in verdicts) >= 7, verdicts
    unknown = [text for text, answer in known.items() if answer == DECLINE][:6]
    for question in unknown:
        ask(browser, question)
        verdicts.append(browser.js(STATUS))
    assert sum("Right: no article" in said for said in verdicts[-6:]) >= 3, verdicts
    ask(browser, "Who are you ?")
    assert "does not know the answer to this question" in browser.js(STATUS)


@in_browser
def test_a_question_is_asked_and_the_answer_is_marked(browser, answering, tmp_path):
    path, _ = answering
    page = tmp_path / "page.html"
    write_page(page, path, "It answers")
    open_page(browser, page, width=390)
    header, tokenizer, models = read_page_weights(path)
    turn_to(browser, len(models) - 1)
    assert browser.js(f"{ROOT_OF}.querySelector('label').textContent").startswith(
        "A question"
    )
    assert browser.js(f"{ROOT_OF}.gptView.prompt.value") == "Where ?"
    mark = {name: tokenizer.ranks[byte] for byte, name in MARKS.items()}
    asked = [mark["‹user›"], *tokenizer.encode(" Where ?"), mark["‹end›"]]
    ids = [tokenizer.end_of_text, *asked, mark["‹assistant›"]]
    there = browser.js(f"{ROOT_OF}.gptView.text.ids")
    stop = [mark["‹end›"], tokenizer.end_of_text]
    here = generate(
        models[-1], torch.tensor([ids]), 120, temperature=0, stop=stop,
        n_vocab=tokenizer.n_vocab,
    )[0].tolist()  # fmt: skip
    assert there == here
    assert browser.js(TEXT).startswith("‹user› Where ?‹end›‹assistant›")
    said = browser.js(f"{ROOT_OF}.querySelector('[role=status]').textContent")
    assert ("The answer did not end." in said) == (there[-1] not in stop)
    for (answer, reply), verdict in VERDICTS.items():
        known = json.dumps({"Where ?": answer} if answer else {})
        given = f"({{known: {known}}}, ' Where ? ', {json.dumps(reply)}, true)"
        assert browser.js(f"gptPage.modes.ask.verdict{given}") == verdict
    assert (
        browser.js("gptPage.modes.ask.verdict({known: {}}, 'toString', 'x', true)")
        == (VERDICTS[None, "B ."])
    )
    assert browser.js("document.documentElement.scrollWidth") <= 390
    choose(browser, 2)
    assert "‹user›" in browser.js(f"{ROOT_OF}.textContent")
    turn_to(browser, 0)  # back to writing
    assert browser.js(f"{ROOT_OF}.gptView.prompt.value") == "The river"
    assert complaints(browser) == []


@in_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_overflow_and_axe_finds_nothing(browser, alone, width, theme):
    open_page(browser, alone, width=width, theme=theme)
    ask(browser, "The river é", count=40)
    choose(browser, 10)
    for stage in range(5):
        assert browser.js("document.documentElement.scrollWidth") <= width, stage
        browser.js(f"{ROOT_OF}.querySelector('[id$=go-1]').click()")
    if not AXE:
        pytest.skip("axe-core-python is not installed")
    (script,) = Path(AXE.origin).parent.rglob("axe.min.js")
    browser.js(script.read_text(encoding="utf-8") + ";1")
    found = browser.js(
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map("
        "v => [v.id, v.nodes.map(n => n.html.slice(0, 160)).slice(0, 3)]))"
    )
    assert found == []


@in_browser
def test_damaged_weights_and_an_old_browser_get_one_line(browser, alone, tmp_path):
    text = alone.read_text()
    policy = text[text.index('<meta http-equiv="Content') :].split(">", 1)[0] + ">"
    unlocked = text.replace(policy, "")
    path = tmp_path / "damaged.html"
    path.write_text(unlocked.replace('\\"n_head\\": 4', '\\"n_head\\": 2'))
    browser.open(path.as_uri())
    assert "weights are damaged (the checksum is wrong)" in browser.js(STATUS)
    assert browser.js(f"{ROOT_OF}.querySelector('.gpt-main').disabled")
    # a script that was changed does not run at all; the examples stay
    path.write_text(text.replace('\\"n_head\\": 4', '\\"n_head\\": 2'))
    browser.open(path.as_uri())
    assert "damaged" in browser.js(STATUS)
    path.write_text(unlocked.replace("class PageText {", "class PageText !{"))
    browser.open(path.as_uri())
    assert "This browser cannot run the model" in browser.js(f"{ROOT_OF}.textContent")
    assert browser.js(f"{ROOT_OF}.querySelectorAll('blockquote').length") == 3


@in_browser
def test_the_policy_forbids_what_the_page_does_not_need(browser, alone):
    open_page(browser, alone)
    assert (
        browser.js("fetch('https://example.org').then(() => 'sent', () => 'refused')")
        == "refused"
    )
    added = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    browser.js(f"(() => {{ {added} }})()")
    assert browser.js("window.ran") is None
    browser.call("Page.setBypassCSP", enabled=False)
    assert "unsafe-eval" not in alone.read_text()
    assert "eval(" not in web_file("page.js") + web_file("view.js")


@in_browser
def test_without_javascript_there_are_examples(browser, alone, stored):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(alone.as_uri())
        document = browser.call("DOM.getDocument")["root"]["nodeId"]
        nodes = browser.call(
            "DOM.querySelectorAll", nodeId=document, selector="blockquote"
        )
        assert len(nodes["nodeIds"]) == len(stored[0]["examples"]) == 3
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
