"""What several test files need."""

import os
from pathlib import Path

import pytest
from engine import WIKITEXT

from gptlib.corpus import load_corpus
from gptlib.tokenizer import TokenizerError, load_tokenizer


@pytest.fixture(scope="session")
def wikitext():
    """GPT-2's tokenizer and the real validation split of WikiText-103, in pieces."""
    if not os.environ.get("GPTLIB_DATA"):
        pytest.skip("GPTLIB_DATA is not set: the real validation split is not here")
    if not (Path(os.environ["GPTLIB_DATA"]) / "wikitext-sample").is_dir():
        pytest.skip("no wikitext-sample below GPTLIB_DATA")
    try:
        return load_tokenizer("gpt2"), list(load_corpus(WIKITEXT).pieces("validation"))
    except TokenizerError as error:
        pytest.skip(f"no GPT-2 vocabulary: {error}")
