"""TinyWiki.

Tangled from book/chapters/A1_tinywiki.md; change it there, not here.
"""

from __future__ import annotations

__all__ = ["DEFAULT_BYTES", "TinyWiki"]

# TinyWiki

DEFAULT_BYTES = {"train": 2_000_000, "validation": 150_000, "test": 150_000}


class TinyWiki:
    """Stub."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def articles(self, split: str):
        raise NotImplementedError
