"""The page's program and PyTorch are one model; and the page, in a real browser."""

import functools
import importlib.util
import json
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

from gptlib.corpus import load_corpus
from gptlib.gpt import GPT, GPTConfig
from gptlib.page import (
    Moment,
    PageError,
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
    spaces = [c for c in map(chr, range(0x3001)) if unicodedata.category(c) in "Zs Zl Zp Cc"]
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    usual = "the river 's I'll 1949 é ßµ中文🙂 \n\t..,;-(){}<|endoftext|>"
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
    rows = [row[: 1 + i * (block - 1) // 49] for i, row in enumerate(rows_of(tokenizer))]
    assert len(rows) == 50
    with torch.no_grad():
        expected = [models[moment](torch.tensor([row]))[0][0, -1] for row in rows]
    found = engine("logits", [moment, rows])
    worst = max((torch.tensor(a) - b).abs().max() for a, b in zip(found, expected))
    print(f"moment {moment}: logits differ by {worst:.1e} at most")
    assert worst < 1e-4


def test_greedy_text_is_pytorch_s_beyond_the_block(engine, stored):
    header, tokenizer, models = stored
    rows = [[tokenizer.end_of_text], *(row[:n] for row, n in zip(rows_of(tokenizer), (9, 40, 200)))]
    expected = [
        generate(models[-1], torch.tensor([row]), 200, temperature=0, n_vocab=tokenizer.n_vocab)[0].tolist()
        for row in rows
    ]
    assert max(map(len, expected)) > header["config"]["block_size"]
    assert engine("greedy", [len(models) - 1, rows, 200]) == expected


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 1.3, "top_k": 40}, {"temperature": 1.3, "topK": 40}),
        ({"top_p": 0.9}, {"topP": 0.9}),
        ({"temperature": 0.8, "top_k": 200, "top_p": 0.5}, {"temperature": 0.8, "topK": 200, "topP": 0.5}),
    ],
)
def test_the_same_darts_draw_the_same_tokens(engine, stored, ours, theirs):
    _, tokenizer, models = stored
    tokens = torch.tensor([row[:150] for row in rows_of(tokenizer) if len(row) >= 150][:2])
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
    torch.manual_seed(0)
    config = GPTConfig(3, 3, 21, 17, True, 320, activation="gelu_tanh")
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
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
    assert len(header["moments"]) == len(models) == 3
    steps = [moment["step"] for moment in header["moments"]]
    assert steps == sorted(steps) and steps[0] == 0


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
