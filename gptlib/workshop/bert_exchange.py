"""BERT's weights as ours.

Tangled from book/workshop/W22_bert_exchange.md; change it there, not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlib.bert import BertError, EncoderBlock, EncoderConfig
from gptlib.gpt import GPT, init_weights
from gptlib.workshop.families import their_names


class BertBlock(EncoderBlock):
    """BERT's block: each norm comes after its addition, (B, T, C) -> (B, T, C)."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.ln_1(x + self.attn(x, keep))
        return self.ln_2(x + self.mlp(x))


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Shape of a BERT."""

    bias: bool = True
    norm_eps: float = 1e-12
    n_types: int = 2  # sentence A or B

    def block(self, layer: int) -> nn.Module:
        return BertBlock(self)

    def norm_layer(self) -> nn.Module:
        return nn.LayerNorm(self.n_embd, eps=self.norm_eps, bias=self.bias)


class Bert(GPT):
    """BERT with its masked-language-model head. Source: Devlin et al. 2018."""

    def __init__(self, config: BertConfig):
        super().__init__(config)  # its last norm, ln_f, is that of the head
        self.wtt = nn.Embedding(config.n_types, config.n_embd)
        self.ln_0 = config.norm_layer()
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        for module in (self.wtt, self.dense):
            init_weights(module)

    def states(
        self, tokens: Tensor, keep: Tensor | None = None, types: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> (B, T, C), the last block's output. keep: False at padding."""
        size, T = self.config.block_size, tokens.shape[1]
        if size < T:
            raise BertError(f"{T} tokens are more than the block_size of {size}")
        if keep is not None and not keep.any(1).all():
            raise BertError("a text is all padding; leave it out")
        types = torch.zeros_like(tokens) if types is None else types
        assert self.wpe is not None
        x = self.wte(tokens) + self.wpe.weight[:T] + self.wtt(types)
        x = self.drop(self.ln_0(x))
        for block in self.h:
            x = block(x, keep)
        return x

    def hidden(self, tokens: Tensor, *options) -> Tensor:
        """(B, T) -> (B, T, C), what the head reads. options: as in `states`."""
        return self.ln_f(F.gelu(self.dense(self.states(tokens, *options))))

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) + self.bias


LAYER = "bert.encoder.layer.{}."
BERT_NAMES = {
    "wte": ["bert.embeddings.word_embeddings"],
    "wpe": ["bert.embeddings.position_embeddings"],
    "wtt": ["bert.embeddings.token_type_embeddings"],
    "ln_0": ["bert.embeddings.LayerNorm"],
    "h.{}.attn.c_attn": [
        LAYER + f"attention.self.{n}" for n in ("query", "key", "value")
    ],
    "h.{}.attn.c_proj": [LAYER + "attention.output.dense"],
    "h.{}.ln_1": [LAYER + "attention.output.LayerNorm"],
    "h.{}.mlp.c_fc": [LAYER + "intermediate.dense"],
    "h.{}.mlp.c_proj": [LAYER + "output.dense"],
    "h.{}.ln_2": [LAYER + "output.LayerNorm"],
    "dense": ["cls.predictions.transform.dense"],
    "ln_f": ["cls.predictions.transform.LayerNorm"],
    "": ["cls.predictions"],  # of `bias`
}


def from_bert(theirs, mask_token: int = 103) -> Bert:
    """A `transformers.BertForMaskedLM` as our `Bert`. 103 is BERT's own [MASK].

    Raises BertError for a configuration that differs in more than the shape.
    """
    c, weights = theirs.config, dict(theirs.state_dict())
    for name, ours in {
        "hidden_act": "gelu",
        "intermediate_size": 4 * c.hidden_size,
        "tie_word_embeddings": True,
        "is_decoder": False,
    }.items():
        if (value := getattr(c, name, ours)) != ours:
            raise BertError(f"{name} is {value!r}; only {ours!r} fits our model")
    model = Bert(
        BertConfig(
            n_layer=c.num_hidden_layers,
            n_head=c.num_attention_heads,
            n_embd=c.hidden_size,
            block_size=c.max_position_embeddings,
            vocab_size=c.vocab_size,
            n_types=c.type_vocab_size,
            norm_eps=c.layer_norm_eps,
            mask_token=mask_token,
        )
    )
    model.load_state_dict(
        {
            ours: torch.cat([weights[name] for name in their_names(ours, BERT_NAMES)])
            for ours in model.state_dict()
        }
    )
    return model.eval()
