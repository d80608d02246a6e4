"""A small GPT, readable in one sitting.

What is notable about it:

- Rotary positions, not learned ones: no parameter to average, and relative distance is what text
  in bytes needs.
- RMSNorm without weights, linear layers without biases: every parameter is a matrix, so Muon takes
  all but the embedding and the head, and the swarm's vector holds nothing that hardly learns.
- Queries and keys are normalised, which keeps attention logits bounded at Muon's large steps.
- Squared ReLU in the MLP: So et al. 2021 (Primer), arXiv:2109.08668.
- Embedding and head are not tied: with 256 bytes the head costs a few per cent of the parameters,
  and a head that starts at zero makes the first loss exactly ln(vocabulary), a number to check.

Guaranteed: two builds from one seed are equal bit for bit on one machine and one torch version.
Not guaranteed: equality across machines or torch versions (a swarm hands its start state over
instead), a key-value cache, or speed beyond what `scaled_dot_product_attention` gives.

Shapes: B sequences, T positions, C width, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_ROTARY_BASE = 10_000.0


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each (context, D / 2) float32."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    angles = torch.outer(torch.arange(context, dtype=torch.float32), _ROTARY_BASE**-exponents)
    return angles.cos(), angles.sin()


def _rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) by their position's angle: Su et al. 2021, arXiv:2104.09864."""
    left, right = x_BHTD.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.type_as(x_BHTD)  # the tables are fp32; under autocast x is bf16


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Three matrices, not one: Muon orthogonalises each by itself.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix each position with those before it; (B, T, C) in and out."""
        B, T, C = x_BTC.shape
        q, k, v = (
            project(x_BTC).view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q, k = _norm(_rotate(q, cos, sin)), _norm(_rotate(k, cos, sin))
        y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then an MLP four times as wide, each added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One layer; (B, T, C) in and out."""
        x_BTC = x_BTC + self.attention(_norm(x_BTC), cos, sin)
        return x_BTC + self.down(F.relu(self.up(_norm(x_BTC))).square())  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        layers: number of blocks.
        width: C, a multiple of `2 * heads` (rotary positions turn pairs).
        heads: H.
        context: the longest T that `forward` takes.
        vocabulary: V; 256 when the tokens are bytes.

    The initial weights are drawn from torch's global CPU generator.
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        context: int,
        vocabulary: int,
    ) -> None:
        super().__init__()
        self.context = context
        self.vocabulary = vocabulary
        self._checkpoints = False
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        cos, sin = _rotary_tables(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Unit-variance activations; every layer starts as the identity, the head as zero."""
        nn.init.normal_(self.embedding.weight)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.zeros_(self.head.weight)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The 2-D matrices between embedding and head, which Muon is made for."""
        return list(self.blocks.parameters())

    def checkpoint_activations(self) -> None:
        """Keep only what goes into each block while training, and compute the rest again.

        Chen et al. 2016, arXiv:1604.06174: a third more time for a fraction of the memory.
        """
        self._checkpoints = True

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens_BT: int64 in [0, V), T at most `context`.

        Returns:
            (B, T, V) logits, float32 (bf16 under autocast).

        Raises:
            ValueError: T is longer than `context`.
        """
        _, T = tokens_BT.shape
        if self.context < T:
            raise ValueError(f"{T} tokens are more than the model's context of {self.context}")
        cos, sin = self.get_buffer("cos")[:T], self.get_buffer("sin")[:T]
        x_BTC = _norm(self.embedding(tokens_BT))
        for block in self.blocks:
            if self._checkpoints and torch.is_grad_enabled():
                # Nothing in a block is drawn at random, so there is no generator to rewind.
                x_BTC = checkpoint(
                    block, x_BTC, cos, sin, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTC = block(x_BTC, cos, sin)
        return self.head(_norm(x_BTC))  # type: ignore[no-any-return]
