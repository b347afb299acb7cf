"""Multi-head attention, with a cache for decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import ref
from nnx.layers._attention_parts import (
    check_inputs,
    check_mask,
    check_sizes,
    norm_of_heads,
    takes,
    window_of,
)
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    default_kernel_init,
    evaluates,
    promote_dtype,
    shape_error,
    zeros,
)
from nnx.layers._decoding import append, check_room, seen, within
from nnx.layers._out_sharding import OutSharding, explain_sharding, fewer_heads
from nnx.layers.attention_functions import dot_product_attention
from nnx.layers.linear_general import LinearGeneral
from nnx.layers.positions import RotaryEmbedding
from nnx.module import Module

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(Module):
    """Multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    With `num_kv_heads` less than `num_heads`, neighbouring query heads share a key and value head:
    grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

    To decode, make a cache with `init_cache`, and call with `decode=True` (or set the attribute, or
    the flag with `model.apply(decode=True)`). Each call appends the keys and values of its tokens, one
    or many, to the cache. Each token sees itself and all earlier tokens in the cache. A full cache forgets
    its oldest tokens, so it becomes a sliding window; positions keep counting. The next text continues the
    last one, unless `init_cache` empties the cache in between.

    Args:
      num_heads: number of query heads.
      in_features: size of the last axis of the queries' input.
      qkv_features: size of all query heads together; by default `in_features`.
      out_features: size of the last axis of the output; by default `in_features`.
      num_kv_heads: number of key and value heads, a divisor of `num_heads`; by default `num_heads`.
      in_kv_features: size of the last axis of the keys' and values' input; by default `in_features`.
      dtype: dtype of the computation; by default, the dtype that input and parameters promote to.
      param_dtype: dtype of the parameters.
      broadcast_dropout: drop the same weights in every batch entry and head.
      dropout_rate: the probability that an attention weight is dropped. Keys come from the ambient
        stream `"dropout"`.
      deterministic: drop nothing. These override it, in this order: the argument of the call, the scope
        flag of this name, the opposite of the scope flag `training`. `model.train()` and `model.eval()`
        set it.
      precision: precision of the products, as for `jax.lax.dot_general`.
      kernel_init, bias_init: initializers of the four projections.
      out_kernel_init, out_bias_init: the initializers of `out`, if they differ.
      use_bias: whether the projections have a bias.
      attention_fn: a function with the arguments of `nnx.dot_product_attention`.
      decode: use the cache. The argument of the call overrides it, and so does a scope flag of this name.
      normalize_qk: normalize each head of queries and keys (https://arxiv.org/abs/2302.05442): True
        for a `LayerNorm` without bias; or a norm class, such as `nnx.RMSNorm` or
        `functools.partial(nnx.RMSNorm, epsilon=1e-5)`, which is called with the size of a head.
      rotary: rotates queries and keys by their positions, after this normalization.
      qkv_promote_dtype, out_promote_dtype, ln_promote_dtype: functions that cast for the
        projections `query`, `key`, `value`; for `out`; for the normalizations.
      qkv_dot_general, out_dot_general, qkv_dot_general_cls, out_dot_general_cls: as for
        `LinearGeneral`.
      kernel_metadata, bias_metadata, query_ln_scale_metadata, key_ln_scale_metadata: metadata of the
        Refs.
      out_kernel_metadata, out_bias_metadata: the metadata of `out`, if they differ.
      in_v_features: size of the last axis of the values' input; by default `in_kv_features`.
      v_features: size of the values of all query heads together; by default `qkv_features`.
      local_window_size: how many positions before and after itself a query sees: a pair, or one number
        for both, as for `jax.nn.dot_product_attention`. `(w - 1, 0)` is Mistral's sliding window of w
        tokens (https://arxiv.org/abs/2310.06825).
      sow_weights: store the weights, before dropout, with `nnx.sow` as `attention_weights`, so that
        `nnx.capture(model, None)` returns them. The argument of the call overrides it. Your own
        `attention_fn` must then take `module=`, and pass it to `nnx.dot_product_attention`.

    Attributes: the projections `query`, `key` (kernels of shape `(in, heads, head_dim)`), `value`
    (`(in, heads, v_head_dim)`) and `out` (`(num_heads, v_head_dim, out_features)`), which are
    `LinearGeneral`; `query_ln` and `key_ln`, norms or None; `cached_key`, `cached_value` and
    `cache_index`, in the collection `"cache"`, None before `init_cache`.

    Raises:
      ValueError: the features or the key heads cannot be divided among the heads; a size of the window
        is negative.
      TypeError: `normalize_qk` is neither a bool nor a norm class.
      MissingStreamError: made outside a scope with a `"params"` stream.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.MultiHeadAttention.init(jax.random.key(0))(num_heads=4, in_features=16)
    >>> x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    >>> y = layer(x, is_causal=True)
    >>> layer.init_cache((2, 8, 16))
    >>> prompt, last = layer(x[:, :5], decode=True), layer(x[:, 5:], decode=True)
    >>> bool(jnp.allclose(jnp.concatenate([prompt, last], axis=1), y, atol=1e-5))
    True
    """

    cached_key: jax.Array | None = ref("cache")
    cached_value: jax.Array | None = ref("cache")
    cache_index: jax.Array | None = ref("cache")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = False,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = zeros,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool | Callable[..., Any] = False,
        rotary: RotaryEmbedding | None = None,
        qkv_promote_dtype: Callable[..., Any] = promote_dtype,
        out_promote_dtype: Callable[..., Any] = promote_dtype,
        ln_promote_dtype: Callable[..., Any] = promote_dtype,
        qkv_dot_general: Callable[..., jax.Array] | None = None,
        out_dot_general: Callable[..., jax.Array] | None = None,
        qkv_dot_general_cls: Callable[[], Callable[..., jax.Array]] | None = None,
        out_dot_general_cls: Callable[[], Callable[..., jax.Array]] | None = None,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        out_kernel_metadata: Metadata = {},  # noqa: B006
        bias_metadata: Metadata = {},  # noqa: B006
        out_bias_metadata: Metadata = {},  # noqa: B006
        query_ln_scale_metadata: Metadata = {},  # noqa: B006
        key_ln_scale_metadata: Metadata = {},  # noqa: B006
        in_v_features: int | None = None,
        v_features: int | None = None,
        local_window_size: int | tuple[int | None, int | None] | None = None,
        sow_weights: bool = False,
    ):
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.in_v_features = self.in_kv_features if in_v_features is None else in_v_features
        self.v_features = self.qkv_features if v_features is None else v_features
        self.head_dim = self.qkv_features // num_heads
        self.v_head_dim = self.v_features // num_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.attention_fn = attention_fn
        self.decode = decode
        self.normalize_qk = normalize_qk
        self.rotary = rotary
        self.local_window_size = local_window_size
        self.sow_weights = sow_weights
        check_sizes(self)

        shared: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
        }

        def project(features: int, heads: int, size: int) -> LinearGeneral:
            return LinearGeneral(
                features,
                (heads, size),
                kernel_init=kernel_init,
                bias_init=bias_init,
                promote_dtype=qkv_promote_dtype,
                dot_general=qkv_dot_general,
                dot_general_cls=qkv_dot_general_cls,
                kernel_metadata=kernel_metadata,
                bias_metadata=bias_metadata,
                **shared,
            )

        self.query = project(in_features, num_heads, self.head_dim)
        self.key = project(self.in_kv_features, self.num_kv_heads, self.head_dim)
        self.value = project(self.in_v_features, self.num_kv_heads, self.v_head_dim)
        self.out = LinearGeneral(
            (num_heads, self.v_head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
            **shared,
        )

        options = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": ln_promote_dtype}
        self.query_ln = norm_of_heads(normalize_qk, self.head_dim, options, query_ln_scale_metadata)
        self.key_ln = norm_of_heads(normalize_qk, self.head_dim, options, key_ln_scale_metadata)
        self.cached_key = self.cached_value = self.cache_index = None

    def init_cache(self, input_shape: Sequence[int], dtype: Dtype = None) -> None:
        """Make an empty cache, or empty the existing one.

        In a `Stack`, let each layer make its own:
        `nnx.vmap(lambda block: block.attention.init_cache(shape))(stack.layers)`. To empty all caches of
        a model, write `model["cache"] = jax.tree.map(jnp.zeros_like, model["cache"])`.

        Args:
          input_shape: `(*batch, length, in_features)`: the cache has room for `length` tokens. For
            a window of w tokens and inputs of at most n at a time, a length of `w + n - 1` is enough.
          dtype: dtype of the cached keys and values; by default `dtype` of the layer, or else the dtype
            of the kernels that compute them.

        Raises:
          ValueError: the shape does not have this form.
        """
        shape = tuple(input_shape)
        if len(shape) < 2 or shape[-1] != self.in_features:
            expected = f"(*batch, length, {self.in_features})"
            raise shape_error(self, "a cache for an input", expected, shape)
        dtype = dtype or self.dtype

        def empty(projection: LinearGeneral, size: int) -> jax.Array:
            own = getattr(projection, "kernel", None)
            kept = self.param_dtype if own is None else own.dtype
            return jnp.zeros((*shape[:-1], self.num_kv_heads, size), dtype or kept)

        self.cached_key = empty(self.key, self.head_dim)
        self.cached_value = empty(self.value, self.v_head_dim)
        self.cache_index = jnp.zeros((), jnp.int32)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        decode: bool | None = None,
        is_causal: bool = False,
        positions: jax.Array | None = None,
        key_positions: jax.Array | None = None,
        rng: jax.Array | None = None,
        sow_weights: bool | None = None,
        out_sharding: OutSharding = None,
        qkv_sharding: OutSharding = None,
    ) -> jax.Array:
        """Attend from each query to the keys; the result is `(*batch, query length, out_features)`.

        When decoding, the key length is the length of the cache, and the token at position p is at
        index `p % length` in it. Once the cache is full, new tokens overwrite the oldest ones.

        Args:
          inputs_q: an input of shape `(*batch, query length, in_features)`.
          inputs_k: an input of shape `(*batch, key length, in_kv_features)`; by default `inputs_q`.
          inputs_v: an input of shape `(*batch, key length, in_v_features)`; by default `inputs_k`.
          mask: where it is 0 or False, a query does not see a key; broadcasts to
            `(*batch, heads, query length, key length)`.
          deterministic: whether to drop no weights.
          decode: whether to use the cache.
          is_causal: let query i see only the keys 0 to i. With the cache this is always so.
          positions: positions of the queries, for `rotary`, of shape `(query length,)` or
            `(*batch, query length)`; by default 0, 1, .... When decoding, the default continues from call
            to call, until `init_cache`.
          key_positions: positions of the keys; by default `positions` if the keys come from `inputs_q`,
            otherwise 0, 1, ....
          rng: a key for dropout, instead of the next one from the stream.
          sow_weights: whether to store the weights for `nnx.capture`.
          out_sharding: how to shard the output, as for `Linear`.
          qkv_sharding: how to shard queries, keys and values, which have the axes `(*batch, length, heads,
            head_dim)`: `P("data", None, "model")` shards the heads. If the key heads cannot be divided,
            they are whole on every device.

        Raises:
          ValueError: the shapes do not fit; there is no cache, or one call has more tokens than the cache
            has room for; there are values without keys; the weights are to be stored, but `attention_fn`
            has no `module=`; one of the shardings is missing or does not fit.
          MissingFlagError: `dropout_rate` is not 0, and `deterministic` is None everywhere.
          MissingStreamError: dropout needs a key, but no stream gives one.
        """
        inputs_q = as_array(self, inputs_q)
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError(
                    "MultiHeadAttention got inputs_v without inputs_k. To compute keys and values from "
                    "the same input, pass it as inputs_k."
                )
            inputs_k = inputs_q
            key_positions = positions if key_positions is None else key_positions
        inputs_k = as_array(self, inputs_k)
        inputs_v = inputs_k if inputs_v is None else as_array(self, inputs_v)
        check_inputs(self, inputs_q, inputs_k, inputs_v)
        if decode is None:
            decode = self.get_flag("decode", False)
        cache = self._cache() if decode else None
        first, length = 0, inputs_k.shape[-2]
        if cache is not None:
            check_room(cache[0].shape, inputs_q.shape, inputs_k.shape)
            first, length = cache[2], cache[0].shape[-3]
        check_mask(self, mask, inputs_q.shape, length)

        window, says = window_of(self), "qkv_sharding"
        try:
            query, key, value = self._projected(inputs_q, inputs_k, inputs_v, qkv_sharding)
            query, key = self._rotated(query, key, positions, key_positions, first)
            options = self._options(deterministic, rng, sow_weights)
            count = query.shape[-3]
            if cache is not None:
                at = cache[2]
                key, value = append(cache[0], key, at), append(cache[1], value, at)
                mask, is_causal = seen(mask, cache[2], count, length, window, query.ndim), False
            elif window is not None:
                inside = within(window, jnp.arange(count)[:, None], jnp.arange(key.shape[-3]))
                mask = inside if mask is None else jnp.logical_and(mask, inside)
            x = self.attention_fn(query, key, value, mask=mask, is_causal=is_causal, **options)
            says = "out_sharding"
            y = self.out(x) if out_sharding is None else self.out(x, out_sharding)
        except Exception as error:
            explain_sharding(self, error, says, inputs_q=inputs_q)
            raise
        if cache is not None:
            # Write last, so that a call that raises leaves the cache as it was.
            self.cached_key, self.cached_value, self.cache_index = key, value, cache[2] + count
        return y

    def _projected(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sharding: OutSharding
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if sharding is None:
            query, key, value = self.query(q), self.key(k), self.value(v)
        else:
            few = fewer_heads(self, sharding, q.ndim + 1, self.num_kv_heads, q)
            query = self.query(q, sharding)
            key, value = self.key(k, few), self.value(v, few)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        return query, key, value

    def _options(
        self, deterministic: bool | None, rng: jax.Array | None, sow_weights: bool | None
    ) -> dict[str, Any]:
        """The keyword arguments that every call of `attention_fn` gets."""
        drops = self.dropout_rate > 0 and not evaluates(self, "deterministic", deterministic)
        if not drops:
            rng = None
        elif rng is None:
            rng = self.make_rng("dropout")
        sows = self.sow_weights if sow_weights is None else sow_weights
        if sows and not takes(self.attention_fn, "module"):
            raise ValueError(
                "MultiHeadAttention cannot store its weights, because its attention_fn has no argument "
                "`module`. Add that argument, and pass it on: "
                "nnx.dot_product_attention(..., module=module). Or leave out sow_weights."
            )
        return {
            **({"module": self} if sows else {}),
            "dtype": self.dtype,
            "precision": self.precision,
            "broadcast_dropout": self.broadcast_dropout,
            "dropout_rate": self.dropout_rate,
            "dropout_rng": rng,
            "deterministic": not drops,
        }

    def _rotated(
        self,
        query: jax.Array,
        key: jax.Array,
        positions: jax.Array | None,
        key_positions: jax.Array | None,
        first: jax.Array | int,
    ) -> tuple[jax.Array, jax.Array]:
        if self.rotary is None:
            if positions is None and key_positions is None:
                return query, key
            raise ValueError(
                "MultiHeadAttention got positions, but it has no rotary embedding to use them. Make it "
                f"with rotary=RotaryEmbedding({self.head_dim}), or leave the positions out."
            )
        if positions is None:
            positions = first + jnp.arange(query.shape[-3])
        if key_positions is None:
            key_positions = first + jnp.arange(key.shape[-3])
        return self.rotary(query, positions), self.rotary(key, key_positions)

    def _cache(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        cached = self.cached_key, self.cached_value, self.cache_index
        if cached[0] is None or cached[1] is None or cached[2] is None:
            raise ValueError(
                "MultiHeadAttention has no cache to decode with. Call init_cache((*batch, length, "
                f"{self.in_features})) first, or pass decode=False."
            )
        return cached[0], cached[1], cached[2]
