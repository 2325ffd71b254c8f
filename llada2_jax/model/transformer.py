"""The transformer. Layers of a kind are stacked on a leading axis and scanned."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llada2_jax import remat
from llada2_jax.model.attention import Attention, KVCache
from llada2_jax.model.layers import FeedForward, RMSNorm, embed, normal, parameter, rotary_tables
from llada2_jax.model.moe import MoE
from llada2_jax.model.pipeline import pipelined
from llada2_jax.sharding import axis_size, constrain, gathered, shardings
from llada2_jax.types import ExpertLoad, ModelConfig, Params
from pallas_kernels.block_attention.decode import ContiguousCache, PagedCache
from pallas_kernels.block_layout import BlockLayout, HostOrDevice, zigzag


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """hidden: [B, T, D] after the final norm. kv: keys and values of these positions, all layers
    (None unless asked for). expert_load: of the MoE layers."""

    hidden: Float[Array, "B T D"]
    kv: KVCache | None
    expert_load: ExpertLoad


class Layer(nnx.Module):
    """Pre-norm attention, then a dense feed-forward or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, *, moe: bool):
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg, rngs)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg, rngs)
        dense = functools.partial(FeedForward, cfg.intermediate_size, module="dense")
        self.mlp = MoE(cfg, rngs) if moe else dense(cfg, rngs)

    def __call__(self, x, rotary, layout, cache):
        attended, kv = self.attention(self.attention_norm(x), rotary, layout, cache)
        x = x + attended
        out = self.mlp(self.mlp_norm(x))
        out, load = out if isinstance(out, tuple) else (out, None)
        return x + out, kv, load


def _stack(cfg: ModelConfig, rngs: nnx.Rngs, count: int, *, moe: bool) -> Layer:
    """`count` layers as one module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs: nnx.Rngs) -> Layer:
        return Layer(cfg, rngs, moe=moe)

    return create(rngs)


def _inverse(order: np.ndarray | slice) -> np.ndarray | slice:
    return order if isinstance(order, slice) else np.argsort(order)


def _layers_of(cache, first: int, count: int):
    """The cache of `count` layers from `first` on."""
    return jax.tree.map(lambda a: a[first : first + count], cache)


class Transformer(nnx.Module):
    """LLaDA2 / Ling 2.0. What it attends to is the layout's business, not the model's."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        v, d, dtype = cfg.vocab_size, cfg.hidden_size, cfg.param_dtype
        self.embedding = parameter(rngs, (v, d), ("vocab", "embed"), normal(cfg), dtype)
        if cfg.num_dense_layers:
            self.dense_layers = _stack(cfg, rngs, cfg.num_dense_layers, moe=False)
        if cfg.num_moe_layers:
            self.moe_layers = _stack(cfg, rngs, cfg.num_moe_layers, moe=True)
        self.final_norm = RMSNorm(d, cfg, rngs)
        if not cfg.tie_word_embeddings:
            self.head = parameter(rngs, (d, v), ("embed", "vocab"), normal(cfg), dtype)
        self.cfg = cfg

    def __call__(
        self,
        tokens: Int[HostOrDevice, "B T"],
        positions: Int[HostOrDevice, "B T"],
        layout: BlockLayout,
        *,
        cache: ContiguousCache | PagedCache | None = None,
        embedding_noise: Float[Array, "B T D"] | None = None,
        return_kv: bool = False,
    ) -> Output:
        """One forward.

        Args:
          tokens: input ids.
          positions: rotary positions; both halves of a training row use the same ones.
          layout: coordinates of the inputs; they attend among themselves by it.
          cache: earlier tokens, which all of these see: one cache a layer, every array of it
            stacked on a leading axis [N, ...].
          embedding_noise: added to the embedding output (§7.1).
          return_kv: also return the keys and values of these positions.
        """
        order = self._order(layout)
        x = embed(self.embedding, jnp.asarray(tokens)[:, order], self.cfg.dtype)
        if embedding_noise is not None:
            x = x + embedding_noise[:, order].astype(x.dtype)
        positions = jnp.asarray(positions)[:, order]
        output = self.layers(x, positions, layout, cache=cache, return_kv=return_kv)
        return dataclasses.replace(output, hidden=output.hidden[:, _inverse(order)])

    def layers(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: BlockLayout,
        *,
        cache: ContiguousCache | PagedCache | None = None,
        return_kv: bool = False,
    ) -> Output:
        """All layers and the final norm, on hidden states. Under mesh axis `context` these and
        their positions come and go in the order that devices share a row in."""
        x = constrain(x, "batch", "length", None)
        rotary = rotary_tables(self.cfg, positions)
        kvs, loads, first = [], [], 0
        for stack, count in self._stacks():
            part = None if cache is None else _layers_of(cache, first, count)
            if axis_size("stage") > 1 and stack is getattr(self, "moe_layers", None):
                x, load = self._in_stages(stack, count, x, rotary, layout)
                kv = None
            else:
                x, kv, load = self._scan(stack, x, rotary, layout, part, return_kv)
            kvs.append(kv)
            loads.append(load)
            first += count
        kv = jax.tree.map(lambda *a: jnp.concatenate(a), *kvs) if return_kv else None
        loads = [load for load in loads if load is not None]
        load = loads[0] if loads else _no_load(self.cfg)
        return Output(self.final_norm(x), kv, load)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 logits."""
        param, vocab_axis = self.output_parameter
        kernel = jnp.moveaxis(gathered(param, hidden.dtype), vocab_axis, 1)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    @property
    def output_parameter(self) -> tuple[nnx.Variable, int]:
        """The head's weights, and which of their axes is the vocabulary. A loss takes them with
        the hidden states (pallas_kernels.vocab_loss) instead of logits of all tokens."""
        return (self.embedding, 0) if self.cfg.tie_word_embeddings else (self.head, 1)

    def _order(self, layout: BlockLayout) -> np.ndarray | slice:
        """In which a row's tokens are laid out, so that each device of mesh axis `context` has an
        equal share of the attention's work (see `zigzag`)."""
        ways = axis_size("context")
        return zigzag(layout.spans, ways).reshape(-1) if ways > 1 else slice(None)

    def _stacks(self) -> list[tuple[Layer, int]]:
        stacks = []
        if self.cfg.num_dense_layers:
            stacks.append((self.dense_layers, self.cfg.num_dense_layers))
        if self.cfg.num_moe_layers:
            stacks.append((self.moe_layers, self.cfg.num_moe_layers))
        return stacks

    def _in_stages(self, stack, count, x, rotary, layout):
        graphdef, params = nnx.split(stack)

        def layers(params, x, rotary, layout):
            module = nnx.merge(graphdef, params)
            x, _, load = self._scan(module, x, rotary, layout, None, False)
            return x, load

        return pipelined(layers, params, count, x, rotary, layout)

    def _scan(self, stack, x, rotary, layout, cache, return_kv):
        graphdef, params = nnx.split(stack)

        def body(x, layer):
            params, cache = layer
            module = nnx.merge(graphdef, params)
            x, kv, load = module(x, rotary, layout, cache)
            x = constrain(x, "batch", "length", None)
            return x, (kv if return_kv else None, load)

        x, (kv, load) = jax.lax.scan(remat.POLICIES[self.cfg.remat](body), x, (params, cache))
        return x, kv, load


def _no_load(cfg: ModelConfig) -> ExpertLoad:
    """Of a model without experts."""
    none = jnp.zeros(0, jnp.int32)
    return ExpertLoad(jnp.zeros((0, cfg.num_experts), jnp.int32), none, none.astype(jnp.float32))


def build(cfg: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The model's structure and its abstract parameters (shapes, dtypes, logical axes)."""
    abstract = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)
    return graphdef, params


def init_params(cfg: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """Freshly initialised parameters, cut by the mesh as they are made; their values do not depend
    on it."""
    placed = None if mesh is None else shardings(build(cfg)[1], mesh)
    return jax.jit(lambda: nnx.state(Transformer(cfg, nnx.Rngs(seed))), out_shardings=placed)()


def merge_params(cfg: ModelConfig, params: Params) -> Transformer:
    """A model from its parameters; cheap, for use inside jitted functions."""
    return nnx.merge(_structure(cfg), params)


@functools.cache
def _structure(cfg: ModelConfig) -> nnx.GraphDef:
    """Traced once a config: a model is merged in every function that is jitted."""
    return build(cfg)[0]
