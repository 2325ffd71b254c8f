"""One optimisation step as a pure function of (state, batch)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from llada2_jax.adapters import split_trained
from llada2_jax.checksums import checksum
from llada2_jax.config import EVENTS, StepConfig, TrainConfig
from llada2_jax.model import build, merge_params
from llada2_jax.model.layers import Adapter
from llada2_jax.objectives import OBJECTIVES, Context, LossOutput, whole_batch_context
from llada2_jax.optimizer import make_optimizer, take_step
from llada2_jax.sharding import (
    batch_sharding,
    constrain,
    in_host_memory,
    keep_stored,
    meshed,
    place_batch,
    replicated,
    shardings,
    single_device_mesh,
)
from llada2_jax.spikes import SpikeWatch, fresh_watch, judge
from llada2_jax.types import Batch, ExpertLoad, ModelConfig, Params

_PROGRAMS = 32
"""Of each kind that are kept: whoever asks for the same one again does not compile it again."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: steps taken, skipped ones included. params: what is trained. buffers: what is stored
    with it but not trained. skipped_in_a_row, skipped: steps not applied (see SpikeConfig).
    rollbacks: how often the run went back. watch: what spikes are told by."""

    step: Int[Array, ""]
    params: Params
    buffers: Params
    opt_state: optax.OptState
    skipped_in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]
    rollbacks: Int[Array, ""]
    watch: SpikeWatch

    @property
    def saved_params(self) -> Params:
        """What a checkpoint keeps: the adapters, if those are trained, and else all."""
        adapters = nnx.filter_state(self.params, Adapter)
        return adapters if jax.tree.leaves(adapters) else self.model_params

    @property
    def model_params(self) -> Params:
        """Parameters and buffers together, as `merge_params` takes them."""
        return nnx.merge_state(self.params, self.buffers)

    @property
    def beside_params(self) -> TrainState:
        """The rest of the state, which a checkpoint keeps beside the model."""
        return dataclasses.replace(self, params=None, buffers=None)


def init_state(cfg: StepConfig, params: Params, mesh: Mesh | None = None) -> TrainState:
    """A state at step 0 from a model's parameters, placed on the mesh (default: one device)."""
    mesh = mesh or single_device_mesh()
    params = jax.device_put(params, shardings(params, mesh))
    trained, buffers = split_trained(params)
    init = make_optimizer(cfg).init
    placed = _optimizer_shardings(cfg, jax.eval_shape(init, trained), mesh)
    opt_state = jax.jit(init, out_shardings=placed)(trained)
    # Committed, so that the first step after a restart compiles to what the later ones run.
    counts = [jnp.zeros((), jnp.int32) for _ in range(4)]
    rest = counts, fresh_watch()
    counts, watch = jax.device_put(rest, shardings(rest, mesh))
    step, in_a_row, skipped, rollbacks = counts
    return TrainState(step, trained, buffers, opt_state, in_a_row, skipped, rollbacks, watch)


def abstract_state(cfg: StepConfig, model_cfg: ModelConfig, mesh: Mesh | None = None):
    """`init_state` as ShapeDtypeStructs with their shardings: to compile for, or restore into."""
    mesh = mesh or single_device_mesh()
    state = jax.eval_shape(lambda p: init_state(cfg, p, mesh), build(model_cfg)[1])
    placed = dataclasses.replace(
        shardings(state, mesh), opt_state=_optimizer_shardings(cfg, state.opt_state, mesh)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        placed,
    )


def _optimizer_shardings(cfg: StepConfig, opt_state: optax.OptState, mesh: Mesh):
    placed = shardings(opt_state, mesh)
    return in_host_memory(placed) if cfg.optimizer.offload else placed


def begin_phase(cfg: StepConfig, state: TrainState) -> TrainState:
    """What does not carry over from one objective or block size to the next."""
    placed = jax.tree.map(lambda x: x.sharding, state.watch)
    state = dataclasses.replace(state, watch=jax.device_put(fresh_watch(), placed))
    return reset_moments(state) if cfg.optimizer.reset_each_phase else state


def roll_back(state: TrainState, to: TrainState) -> TrainState:
    """The earlier state `to`, with all steps from there to `state` counted as skipped."""
    return dataclasses.replace(
        to,
        step=state.step,
        opt_state=_at_step(to.opt_state, state.step + 0),  # a copy: the state is donated
        skipped=to.skipped + state.step - to.step,
        rollbacks=state.rollbacks + 1,
        skipped_in_a_row=_zeros_in_place_of(state.skipped_in_a_row),
    )


def _at_step(opt_state: optax.OptState, step: Int[Array, ""]) -> optax.OptState:
    """The learning rate goes by the step, also over steps that were skipped."""

    def at(part):
        return part._replace(count=step) if _is_schedule(part) else part

    return jax.tree.map(at, opt_state, is_leaf=_is_schedule)


def _is_schedule(part) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)


def reset_moments(state: TrainState) -> TrainState:
    """Forgets Adam's moments; the learning-rate schedule goes on."""

    def reset(part):
        return jax.tree.map(_zeros_in_place_of, part) if _is_adam(part) else part

    opt_state = jax.tree.map(reset, state.opt_state, is_leaf=_is_adam)
    return dataclasses.replace(state, opt_state=opt_state)


def _zeros_in_place_of(x):
    # Placed as the old ones: a step compiles anew for arrays that lie elsewhere.
    return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)


def _is_adam(part) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def make_context(
    cfg: TrainConfig, block_size: int, mask_id: int, *, sigma: float = 0.0, draw: int = 0
) -> Context:
    """The data a step gets besides its rows."""
    return Context(
        block_size=np.int32(block_size),
        sigma=np.float32(sigma),
        rates=np.asarray([-1.0, 1.0], np.float32),
        noise=cfg.noise,
        seed=cfg.seed,
        mask_id=mask_id,
        block_anchor=cfg.data.block_anchor,
        draw=np.int32(draw),
        dpo=cfg.dpo,
        cap=cfg.cap,
    )


def _loss_and_grad(
    objective: str, model_cfg: ModelConfig, router_z_loss: float, params, buffers, batch, context
):
    """Sum of the loss and its gradient over one micro-batch; nothing is divided here."""

    def total(params):
        model = merge_params(model_cfg, nnx.merge_state(params, buffers))
        output = OBJECTIVES[objective](model, batch, context)
        return output.loss.total + router_z_loss * output.expert_load.z.sum(), output

    grads, output = jax.grad(total, has_aux=True)(params)
    return keep_stored(grads), output


def accumulated(
    objective: str,
    model_cfg: ModelConfig,
    params,
    buffers,
    batch: Batch,
    context: Context,
    n: int,
    router_z_loss: float = 0.0,
    divided: bool = True,
) -> tuple[Params, LossOutput]:
    """Gradient of the mean loss over n micro-batches, and the output over all their rows.

    How the batch is cut leaves both alone: sums are divided once, by the whole denominator, or not
    (`divided`), where the caller does that on its way. Gradients of several micro-batches are
    summed in fp32, whatever the parameters' dtype.
    """
    context = whole_batch_context(objective, batch, context)
    one = functools.partial(_loss_and_grad, objective, model_cfg, router_z_loss, params, buffers)
    if n == 1:
        grads, output = one(batch, context)
    else:
        micro = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        micro = jax.tree.map(lambda x: constrain(x, None, "batch"), micro)
        first, rest = jax.tree.map(lambda x: x[0], micro), jax.tree.map(lambda x: x[1:], micro)

        def sums(batch):
            grads, output = one(batch, context)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return grads, dataclasses.replace(output, nll=None)

        def add(carry, batch):
            return jax.tree.map(jnp.add, carry, sums(batch)), ()

        (grads, output), _ = jax.lax.scan(add, sums(first), rest)
    if divided:
        weight = _denominator(output)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    return grads, output


def _denominator(output: LossOutput) -> Float[Array, ""]:
    return jnp.maximum(output.loss.weight, 1.0)


def _norm(grads: Params) -> Float[Array, ""]:
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


@functools.lru_cache(maxsize=_PROGRAMS)
def make_train_step(
    cfg: StepConfig, model_cfg: ModelConfig, objective: str, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, Context], tuple[TrainState, dict[str, Array]]]:
    """The jitted step of one objective on a mesh (default: one device); the state is donated, and
    stays where `init_state` put it.

    A step that would do harm (see SpikeConfig) leaves parameters and optimizer as they were and is
    counted. Metrics are device scalars: the caller chooses when to wait. `data_checksum` tells
    which rows a step saw.
    """
    mesh = mesh or single_device_mesh()

    @meshed(mesh)
    def step(state: TrainState, batch: Batch, context: Context):
        grads, output = accumulated(
            objective,
            model_cfg,
            state.params,
            state.buffers,
            batch,
            context,
            cfg.optimizer.accumulate,
            cfg.optimizer.router_z_loss,
            divided=False,
        )
        weight = _denominator(output)
        norm = _norm(grads) / weight
        loss = output.loss.mean()
        load = output.expert_load
        overflow = load.overflow.sum()
        watch, applied, events = judge(cfg.spikes, state.watch, loss, norm, overflow > 0)
        before = state.opt_state
        if cfg.optimizer.offload:
            before = jax.device_put(before, jax.memory.Space.Device)
        params, opt_state = take_step(
            *(cfg, state.params, grads, before),
            weight=weight,
            norm=norm,
            step=state.step,
            applied=applied,
        )
        skip = (~applied).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            buffers=_balanced(cfg, state.buffers, load.tokens, applied),
            opt_state=_at_step(opt_state, state.step + 1),
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
            skipped=state.skipped + skip,
            rollbacks=state.rollbacks,
            watch=watch,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "data_checksum": _data_checksum(batch),
            "mask_embedding_norm": jnp.linalg.norm(
                state.model_params["embedding"][...][context.mask_id].astype(jnp.float32)
            ),
            "expert_load_max_over_mean": _imbalance(load.tokens),
            "expert_overflow": overflow,
            "router_z": _router_z(load, model_cfg),
        }
        metrics |= {f"spike_{name}": events[i] for i, name in enumerate(EVENTS)}
        metrics |= {name: value.mean() for name, value in output.metrics.items()}
        return new_state, metrics

    stored = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, model_cfg, mesh))
    return jax.jit(
        step,
        in_shardings=(stored, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(stored, replicated(mesh)),
        donate_argnums=0,
    )


def _data_checksum(batch: Batch) -> UInt32[Array, ""]:
    """Which documents, which parts of them and which visits, in which rows and places."""
    fields = (batch.tokens, batch.document_ids, batch.document_positions, batch.visits)
    return checksum(jnp.stack([jnp.asarray(field) for field in fields]))


def _balanced(
    cfg: StepConfig, buffers: Params, load: Int[Array, "layers E"], applied: Bool[Array, ""]
) -> Params:
    """Auxiliary-loss-free balancing: the selection bias of an expert with less than the mean load
    rises by the configured rate, that of one with more falls; the bias keeps a mean of zero. Not
    where the step is not applied."""
    rate = cfg.optimizer.expert_bias_rate
    if not rate:
        return buffers
    load = load.astype(jnp.float32)
    delta = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    delta = jnp.where(applied, delta - delta.mean(-1, keepdims=True), 0.0)
    return jax.tree.map(lambda bias: bias + delta.astype(bias.dtype), buffers)


def _imbalance(load: Int[Array, "layers E"]) -> Float[Array, " layers"]:
    """Largest load of an expert over the mean load, of each MoE layer."""
    load = load.astype(jnp.float32)
    return load.max(-1) / jnp.maximum(load.mean(-1), 1e-9)


def _router_z(load: ExpertLoad, model_cfg: ModelConfig) -> Float[Array, ""]:
    """Mean logsumexp(router logits)² over positions and layers."""
    positions = load.tokens.sum().astype(jnp.float32) / model_cfg.experts_per_token
    return load.z.sum() / jnp.maximum(positions, 1.0)


def make_eval_step(
    model_cfg: ModelConfig, objective: str, mesh: Mesh | None = None
) -> Callable[[Params, Batch, Context], LossOutput]:
    """The objective without a gradient. On a mesh it takes a batch of all rows, from every process,
    and its results are on every device; default: the device of the parameters."""
    step = eval_program(model_cfg, objective, mesh)
    if mesh is None:
        return step
    return lambda params, batch, context: step(params, place_batch(batch, mesh), context)


@functools.lru_cache(maxsize=_PROGRAMS)
def eval_program(model_cfg: ModelConfig, objective: str, mesh: Mesh | None) -> jax.stages.Wrapped:
    """The jitted function of `make_eval_step`, which takes rows that are on the mesh. Experts have
    room for the worst case: there is no step to refuse."""
    model_cfg = model_cfg.with_room_for_all

    def evaluate(params, batch, context):
        context = whole_batch_context(objective, batch, context)
        return OBJECTIVES[objective](merge_params(model_cfg, params), batch, context)

    if mesh is None:
        return jax.jit(evaluate)
    return jax.jit(
        meshed(mesh)(evaluate),
        in_shardings=(None, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


@functools.lru_cache(maxsize=_PROGRAMS)
def make_grad_norms_by_rate(
    model_cfg: ModelConfig, objective: str, buckets: int, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, Context], list[Float[Array, ""]]]:
    """Norm of the gradient from the tokens whose group's mask rate lies in each of `buckets` equal
    ranges of (0, 1]; one backward pass a bucket, so a diagnostic for validation time (§7.1). NaN
    where experts had no room for all pairs."""

    @jax.jit
    @meshed(mesh or single_device_mesh())
    def norm(state: TrainState, batch: Batch, context: Context):
        inputs = state.params, state.buffers, batch, context, 1
        grads, output = accumulated(objective, model_cfg, *inputs)
        return jnp.where(output.expert_load.overflow.sum() > 0, jnp.nan, _norm(grads))

    def norms(state, batch, context):
        edges = np.linspace(0, 1, buckets + 1, dtype=np.float32)
        ranges = [np.stack(pair) for pair in zip(edges[:-1], edges[1:], strict=True)]
        return [norm(state, batch, dataclasses.replace(context, rates=r)) for r in ranges]

    return norms
