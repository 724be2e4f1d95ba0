"""The model: embeddings, blocks and a tied head.

Tangled from book/chapters/07_gpt.md; change it there, not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.block import ACTIVATIONS, Block


def init_weights(module: nn.Module) -> None:
    """GPT-2's start: weights N(0, 0.02), biases 0; layer norms keep 1 and 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT. The defaults are Table 1 of the report."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 384
    block_size: int = 256  # tokens of context
    bias: bool = False  # in linear layers and layer norms
    vocab_size: int = 50304  # GPT-2's 50,257 padded to a multiple of 64
    dropout: float = 0.0
    activation: str = "gelu"  # "gelu" exact, "gelu_tanh" as GPT-2

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if (value := getattr(self, name)) < 1:
                raise GptlibError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise GptlibError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                "every head needs the same width"
            )
        if not 0 <= self.dropout < 1:
            raise GptlibError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise GptlibError(f"unknown activation {self.activation!r}; choose {known}")

    def block(self, layer: int) -> nn.Module:
        """A new block, (B, T, C) -> (B, T, C), for the 0-based layer."""
        return Block(
            self.n_embd,
            self.n_head,
            bias=self.bias,
            dropout=self.dropout,
            activation=self.activation,
        )

    def norm_layer(self) -> nn.Module:
        """A new norm, (..., C) -> (..., C)."""
        return nn.LayerNorm(self.n_embd, bias=self.bias)

    def position_table(self) -> nn.Embedding | None:
        """A row of C numbers for each position; None for a model without them."""
        return nn.Embedding(self.block_size, self.n_embd)

    def untied_head(self) -> nn.Linear | None:
        """None: the head is the token table."""
        return None


class GPT(nn.Module):
    """GPT-2: two embeddings, `n_layer` blocks, a norm, a head tied to the embedding.

    Weight names are GPT-2's: `wte`, `h.0.attn.c_attn`. Source: Radford et al. 2019.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)  # also the output head
        self.wpe = c.position_table()
        self.drop = nn.Dropout(c.dropout)
        self.h = nn.ModuleList(c.block(layer) for layer in range(c.n_layer))
        self.ln_f = c.norm_layer()
        self.lm_head = c.untied_head()
        self.apply(init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # writes to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))

    def hidden(self, tokens: Tensor, cache=None) -> Tensor:
        """(B, T) int64 -> (B, T, C), what the head reads.

        Raises GptlibError for more than block_size tokens.
        """
        start = 0 if cache is None else cache.length
        stop = start + tokens.shape[1]
        if stop > self.config.block_size:
            raise GptlibError(
                f"{stop} tokens are more than the block_size of "
                f"{self.config.block_size}; crop the oldest"
            )
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[start:stop]
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache.layers[i])
        return self.ln_f(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), a row for each token: the token table itself if they are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) logits: the inner product with every token's row."""
        return F.linear(hidden, self.head_weight)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T) int64 -> logits (B, T, V), and the loss if there are targets (B, T).

        The loss is the mean cross-entropy in nats.
        """
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def n_parameters(self, *, include_positions: bool = False) -> int:
        """Number of parameters; as in Table 1, the position table is left out."""
        total = sum(p.numel() for p in self.parameters())
        if self.wpe is None or include_positions:
            return total
        return total - self.wpe.weight.numel()

    def flops_per_token(self) -> int:
        """Floating-point operations of a training step, per token.

        Six per weight of every matmul, the head included, and 12 * n_layer * n_embd *
        block_size for attention. Source: Chowdhery et al. 2022, appendix B.
        """
        c, weights = self.config, self.n_parameters()
        if self.lm_head is not None:
            weights -= self.wte.weight.numel()  # it is looked up, not multiplied
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device
