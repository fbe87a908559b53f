"""Text encoders: one transformer that is CLIP's, OpenCLIP's, LDM's BERT-style one, or a tiny one.

Pre-norm transformer (https://arxiv.org/abs/1706.03762; CLIP, https://arxiv.org/abs/2103.00020,
section 2.4) over tokens s_1 .. s_n, with learned positions:

    (1)  h = token[s] + position[1 .. n]
    (2)  each layer:  h = h + attention(norm1(h));   h = h + W2 g(W1 norm2(h))
    (3)  out = final_norm(h)

What differs between the published encoders is in the fields:

    CLIP ViT-L/14 (Stable Diffusion 1.x): the defaults; causal, g = quick GELU, x sigmoid(1.702 x).
    OpenCLIP ViT-H/14 (SD 2.x): width 1024, 24 layers, 16 heads, g = GELU; SD 2.x takes what leaves
        the layer before the last, still normed: skip_layers=1, or 23 layers (Diffusers).
    LDM's BERTEmbedder (https://arxiv.org/abs/2112.10752, appendix E.2.1; CompVis,
        `ldm/modules/x_transformer.py`): `ldm_bert()`.
    Stable Diffusion XL: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 (width 1280, 32 layers, 20 heads,
        GELU) beside each other: `TextPair`. Stable Diffusion 3 has T5 as well.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion.models.attention import Attention, FeedForward
from diffusion.models.layers import Dropout
from diffusion.models.t5 import T5Encoder

# Variance in two passes: CLIP's residual stream has entries in the hundreds.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


class TextLayer(nn.Module):
    """Eq. 2."""

    heads: int
    head_dim: int
    activation: str
    mult: int | float
    qkv_bias: bool
    dropout: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "batch length width"],
        mask: Bool[Array, "#batch 1 #length length"] | None,
        keys: Key[Array, "batch"] | None,
    ) -> Float[Array, "batch length width"]:
        norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        attention = Attention(
            self.heads, self.head_dim, qkv_bias=self.qkv_bias, dtype=self.dtype, name="attention"
        )
        feed_forward = FeedForward(self.activation, self.mult, self.dtype, name="ff")
        out = attention(norm(name="norm1")(h), mask=mask)
        h = h + Dropout(self.dropout, name="attention_dropout")(out, keys)
        out = feed_forward(norm(name="norm2")(h))
        return h + Dropout(self.dropout, name="ff_dropout")(out, keys)


class TextTransformer(nn.Module):
    """`encoder.apply({"params": p}, tokens, mask, keys)`: hidden states (batch, length, width).

    vocab_size: tokens there are. max_length: positions there are.
    width, layers, heads, head_dim: None is width // heads. mult: of the feed-forward's inner width.
    activation: a key of `attention.ACTIVATIONS`. causal: a token sees itself and those before it.
    skip_layers: how many of the last layers are not run.
    logits_head: hold the projection to the vocabulary that LDM's encoder has among its parameters;
        the hidden states do not use it, so it gets no gradient.
    dropout: after attention and feed-forward; embedding_dropout: on the sum of eq. 1.
    embedding_std: of both tables at the start; 0.02 is CLIP's and LDM's. What is small beside a
        layer's output, which is nearly the same for every token at first, is long lost in it: few
        layers trained from scratch for minutes tell what belongs together only from about 1 up.
    epsilon: of the layer norms. dtype: what to compute in; parameters stay float32.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    head_dim: int | None = None
    mult: int | float = 4
    activation: str = "quick_gelu"
    causal: bool = True
    qkv_bias: bool = True
    skip_layers: int = 0
    logits_head: bool = False
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    embedding_std: float = 0.02
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        keys: Key[Array, "batch"] | None = None,
        penultimate: bool = False,
    ) -> Float[Array, "batch length width"] | tuple[Float[Array, "batch length width"], Array]:
        """Eq. 3, in float32 or wider; `penultimate`: and h as it enters the last layer that runs.

        `mask` True: a token, False: padding, which nothing looks at; each row has at least one True
        (what comes out at padding itself has no meaning). `keys` None: no dropout. A token outside
        the vocabulary gives NaN. ValueError for more tokens than `max_length`, and for fields that
        contradict.
        """
        self._check(tokens)
        length = tokens.shape[1]
        h = self._embed(self.vocab_size, "token_embedding")(tokens)
        position = self._embed(self.max_length, "position_embedding").embedding[:length]
        h = h + position[None].astype(h.dtype)
        h = Dropout(self.embedding_dropout, name="embedding_dropout")(h, keys)
        look, before = self._look(length, mask), h
        for i in range(self.layers - self.skip_layers):
            before, h = h, self._layer(f"layers_{i}")(h, look, keys)
        h = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="final_norm")(h)
        if self.logits_head and self.is_initializing():
            nn.Dense(self.vocab_size, name="to_logits")(h)
        h, before = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (h, before))
        return (h, before) if penultimate else h

    def _embed(self, entries: int, name: str) -> nn.Embed:
        init = nn.initializers.normal(self.embedding_std)
        return nn.Embed(entries, self.width, dtype=self.dtype, embedding_init=init, name=name)

    def _layer(self, name: str) -> TextLayer:
        return TextLayer(
            self.heads,
            self.head_dim or self.width // self.heads,
            self.activation,
            self.mult,
            self.qkv_bias,
            self.dropout,
            self.epsilon,
            self.dtype,
            name=name,
        )

    def _look(self, length: int, mask: Array | None) -> Array | None:
        """Which query may look at which key: (batch, 1, length, length), or 1 for it; None: all."""
        look = None if mask is None else mask[:, None, None, :]
        if self.causal:
            causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
            look = causal if look is None else causal & look
        return look

    def _check(self, tokens: Array) -> None:
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"tokens have length {tokens.shape[1]} but the text encoder has max_length="
                f"{self.max_length} positions: truncate the tokens, or set max_length"
            )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}: choose heads "
                "that do, or set head_dim"
            )
        if not 0 <= self.skip_layers < self.layers:
            raise ValueError(
                f"skip_layers={self.skip_layers} must be at least 0 and below layers={self.layers}"
            )


class TextPair(nn.Module):
    """Stable Diffusion XL's two encoders (https://arxiv.org/abs/2307.01952, section 2.1), or
    Stable Diffusion 3's three (https://arxiv.org/abs/2403.03206, section 4).

    `pair.apply({"params": p}, tokens)`: "context" (batch, length, both widths), of both what enters
    the last layer; "pooled" (batch, projection), the second's end token, projected (CLIP, eq. 4 of
    `clip.py`). Tokens (batch, 2 length) are the first's and then the second's, whose paddings
    differ. end: the end token.
    third: T5; the context, filled up with zeros to its width, is followed by its `third_length`
    states, of tokens after the others'; of no layers, by zeros, and it has no tokens. "pooled" is
    then the first's, of `first_projection`, before the second's.
    """

    first: TextTransformer
    second: TextTransformer
    projection: int = 1280
    end: int = 49407
    third: T5Encoder | None = None
    third_length: int = 256
    first_projection: int = 768

    @property
    def vocab_size(self) -> int:
        return min(self.first.vocab_size, self.second.vocab_size)

    @property
    def third_tokens(self) -> int:
        return self.third_length if self.third is not None and self.third.layers else 0

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch both"],
        mask: None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> dict[str, Array]:
        length = tokens.shape[1] - self.third_tokens
        ours, theirs = jnp.split(tokens[:, :length], 2, axis=1)
        own, first = self.first(ours, keys=keys, penultimate=True)
        last, second = self.second(theirs, keys=keys, penultimate=True)
        context = jnp.concatenate([first, second], axis=-1)
        pooled = self._pooled(last, theirs, self.projection, "project")
        if self.third is None:
            return {"context": context, "pooled": pooled}
        wide = self.third.width - context.shape[-1]
        if wide < 0:
            raise ValueError(
                f"text_encoder_3.width={self.third.width} is under the {context.shape[-1]} of the "
                "other two together, which are filled up to it: raise it"
            )
        states = jnp.zeros((len(tokens), self.third_length, self.third.width), context.dtype)
        if self.third.layers:
            states = self.third(tokens[:, length:])
        context = jnp.concatenate([jnp.pad(context, ((0, 0), (0, 0), (0, wide))), states], axis=1)
        first = self._pooled(own, ours, self.first_projection, "project_first")
        return {"context": context, "pooled": jnp.concatenate([first, pooled], axis=-1)}

    def _pooled(self, states: Array, tokens: Array, width: int, name: str) -> Array:
        place = (tokens == self.end).argmax(-1)
        found = jnp.take_along_axis(states, place[:, None, None], axis=1)[:, 0]
        found = nn.Dense(width, use_bias=False, dtype=self.second.dtype, name=name)(found)
        return found.astype(jnp.promote_types(found.dtype, jnp.float32))


def ldm_bert(width: int = 1280, layers: int = 32, **fields: Any) -> TextTransformer:
    """LDM's BERTEmbedder: not causal, 8 heads of 64 whatever the width, no bias on q, k, v, GELU.

    Its tokenizer is BERT's (bert-base-uncased); its weights are trained from scratch with the
    U-Net. The published 581,994,042 parameters count the unused `to_logits` (542,895,360 without
    it).
    """
    defaults = {
        "vocab_size": 30522,
        "heads": 8,
        "head_dim": 64,
        "activation": "gelu",
        "causal": False,
        "qkv_bias": False,
        "logits_head": True,
    }
    return TextTransformer(width=width, layers=layers, **(defaults | fields))
