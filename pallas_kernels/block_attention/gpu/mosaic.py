"""The three kernels in Pallas Mosaic GPU, for Hopper: TMA copies, wgmma, specialised warpgroups.

One warpgroup copies tiles into a ring of buffers, two compute. Over the keys (forward, gradient of
q) the two take two heads of one group at the same queries, so that they share keys and values, and
a tile on the block diagonal or a document edge stays 64 queries small. Over the queries (gradients
of k and v) they take two halves of a tile of keys and share queries.

The ring is jax's own pipeline; what is ours is that its length and the tiles it fetches come from
the ranges of `schedule`, in the backward pass as in the forward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_attention.constants import LOG2_E, MASKED
from pallas_kernels.block_attention.gpu import schedule
from pallas_kernels.block_attention.gpu.schedule import Tiles

WARPGROUPS = 2  # that compute
ROWS = 64  # of a matrix product, for each of them
COPY_REGISTERS = 40  # leaves the computing warpgroups 232 a thread
STAGES = 2
PROGRAMS = 4 * 128  # for each multiprocessor (132) several, of which half are long


TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # a value for each row of a tile
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def unsupported(q, k, tiles: Tiles) -> str | None:
    """Why arrays like q and k cannot be run, or not with these tiles, or None."""
    group = q.shape[2] // k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} is not bfloat16 or float16"
    if q.shape[3] not in (64, 128):
        return f"head_dim {q.shape[3]} is not 64 or 128"
    if group % WARPGROUPS:
        return f"{group} query heads a key head: an even number is needed"
    rows = tiles.forward[0], tiles.query_gradient[0], tiles.key_gradients[1]
    if rows != (ROWS, ROWS, WARPGROUPS * ROWS):
        return f"{tiles}: queries {ROWS}, and {WARPGROUPS * ROWS} keys in key_gradients, are fixed"
    others = tiles.forward[1], tiles.query_gradient[1], tiles.key_gradients[0]
    if any(n % 64 for n in others):
        return f"{tiles}: the other sizes are not multiples of 64"
    return None


def default_tiles(q, k) -> Tiles:
    """64 queries of two heads; as many keys as fit registers and shared memory."""
    return Tiles(
        forward=(ROWS, 128), query_gradient=(ROWS, 64), key_gradients=(64, WARPGROUPS * ROWS)
    )


def forward(q, k, v, starts, ends, ranges, *, tile, interpret):
    """Output like q, and log2 of the softmax denominators, fp32 [batch, heads, queries]."""
    batch, queries, heads, head_dim = q.shape
    group = heads // k.shape[2]
    _, key_tile = tile

    def block_attention_forward(
        q_ref, k_ref, v_ref, starts_ref, ends_ref, ranges_ref, o_ref, lse_ref,
        q_smem, lse_smem, loaded, turn,
    ):  # fmt: skip
        row, queries, head, kv_head, wg, tiles, whole = _over_queries(ranges_ref, group)
        q_smem, lse_smem, loaded = q_smem.at[wg], lse_smem.at[wg], loaded.at[wg]
        scale = head_dim**-0.5 * LOG2_E

        def take_turns():
            """While one warpgroup has the tensor cores, the other does its softmax."""
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(pipeline):
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, loaded)
            total = _filled(0.0, (ROWS,), ROW)
            top = _filled(MASKED, (ROWS,), ROW)
            out = _filled(0.0, (ROWS, head_dim), TILE)
            plgpu.barrier_wait(loaded)
            pl.when(wg == 1)(take_turns)
            total, top, out = pipeline((total, top, out))
            pl.when(wg == 0)(take_turns)
            total = jnp.where(total > 0.0, total, 1.0)  # a row without keys
            q_smem[...] = (out / _rows(total, out.shape)).astype(q.dtype)
            lse_smem[...] = top + jnp.log(total) * LOG2_E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, o_ref.at[row, queries, head])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[row, head, queries])
            plgpu.wait_smem_to_gmem(0)

        def visit(index, k_smem, v_smem, k_free, v_free, carry):
            (step,) = index
            total, top, out = carry

            def scores(acc):
                plgpu.wgmma(acc, q_smem, k_smem.T)
                take_turns()
                return acc[...]

            score = pl.run_scoped(scores, plgpu.ACC((ROWS, key_tile), jnp.float32))
            plgpu.barrier_arrive(k_free)

            def masked():
                inside = _inside(starts_ref, ends_ref, row, queries, tiles, step, key_tile)
                return jnp.where(inside, score, -jnp.inf)

            score = lax.cond(step < whole, lambda: score, masked)
            new_top = jnp.maximum(top, score.max(axis=1) * scale)
            weight = jnp.exp2(score * scale - _rows(new_top, score.shape))
            decay = jnp.exp2(top - new_top)
            total = total * decay + weight.sum(axis=1)
            weight = weight.astype(q.dtype)
            take_turns()
            out = out * _rows(decay, out.shape) + _product(weight, v_smem, out.shape)
            plgpu.barrier_arrive(v_free)
            return total, new_top, out

        keys = _spec((key_tile, head_dim), q.dtype, lambda i: (schedule.walk(tiles, i)[1], 0))
        _pipeline(visit, compute, (schedule.steps(tiles),), [keys, keys])(
            *(x.at[row, :, kv_head] for x in (k_ref, v_ref))
        )

    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    scratch = [
        _smem((WARPGROUPS, ROWS, head_dim), q.dtype),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    grid = heads // WARPGROUPS, queries // ROWS, batch
    call = _launch(block_attention_forward, (_like(q), lse), scratch, grid, interpret)
    return call(q, k, v, starts, ends, ranges)


def query_gradient(q, k, v, do, lse, delta, starts, ends, ranges, *, tile, interpret):
    """dq, like q. `delta` is the row sum of do · o, fp32 [batch, heads, queries]."""
    batch, queries, heads, head_dim = q.shape
    group = heads // k.shape[2]
    _, key_tile = tile

    def block_attention_query_gradient(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, starts_ref, ends_ref, ranges_ref, dq_ref,
        q_smem, do_smem, loaded,
    ):  # fmt: skip
        row, queries, head, kv_head, wg, tiles, whole = _over_queries(ranges_ref, group)
        q_smem, do_smem, loaded = q_smem.at[wg], do_smem.at[wg], loaded.at[wg]
        scale = head_dim**-0.5

        def compute(pipeline):
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, loaded)
            plgpu.copy_gmem_to_smem(do_ref.at[row, queries, head], do_smem, loaded)
            lse, delta = (
                plgpu.load(x.at[row, head, queries], layout=ROW, optimized=False)
                for x in (lse_ref, delta_ref)
            )
            plgpu.barrier_wait(loaded)

            def accumulate(dq):
                pipeline((dq, lse, delta))
                return dq[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((ROWS, head_dim), jnp.float32))
            q_smem[...] = (dq * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0)

        def visit(index, k_smem, v_smem, k_free, v_free, carry):
            (step,) = index
            dq, lse, delta = carry
            shape = ROWS, key_tile
            score = _product(q_smem, k_smem.T, shape)
            weight = jnp.exp2(score * (scale * LOG2_E) - _rows(lse, shape))

            def masked():
                inside = _inside(starts_ref, ends_ref, row, queries, tiles, step, key_tile)
                return jnp.where(inside, weight, 0.0)

            weight = lax.cond(step < whole, lambda: weight, masked)
            d_weight = _product(do_smem, v_smem.T, shape)
            plgpu.barrier_arrive(v_free)
            d_score = (weight * (d_weight - _rows(delta, shape))).astype(q.dtype)
            plgpu.wgmma(dq, d_score, k_smem)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_free)
            return dq, lse, delta

        keys = _spec((key_tile, head_dim), q.dtype, lambda i: (schedule.walk(tiles, i)[1], 0))
        _pipeline(visit, compute, (schedule.steps(tiles),), [keys, keys])(
            *(x.at[row, :, kv_head] for x in (k_ref, v_ref))
        )

    smem = _smem((WARPGROUPS, ROWS, head_dim), q.dtype)
    scratch = [smem, smem, plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)]
    grid = heads // WARPGROUPS, queries // ROWS, batch
    call = _launch(block_attention_query_gradient, _like(q), scratch, grid, interpret)
    return call(q, k, v, do, lse, delta, starts, ends, ranges)


def key_gradients(q, k, v, do, lse, delta, starts, ends, ranges, *, tile, interpret):
    """dk and dv, like k and v. `ranges` are those of query tiles for each key tile."""
    batch, keys, kv_heads, head_dim = k.shape
    query_tile, key_tile = tile
    group = q.shape[2] // kv_heads
    parts = _parts(batch * kv_heads * (keys // key_tile), group)
    members = group // parts
    partial = jax.ShapeDtypeStruct(
        (batch, keys, kv_heads * parts, head_dim), k.dtype if parts == 1 else jnp.float32
    )

    def block_attention_key_gradients(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, starts_ref, ends_ref, ranges_ref,
        dk_ref, dv_ref, k_smem, v_smem, out_smem, loaded,
    ):  # fmt: skip
        row, number, part, wg = map(lax.axis_index, ("rows", "tiles", "heads", "warpgroup"))
        tiles, whole = _tiles(ranges_ref, row, number)
        own = pl.ds(number * key_tile + wg * ROWS, ROWS)
        k_smem, v_smem, out_smem, loaded = (x.at[wg] for x in (k_smem, v_smem, out_smem, loaded))
        scale = head_dim**-0.5

        def compute(pipeline):
            kv_head = lax.div(part, parts)
            plgpu.copy_gmem_to_smem(k_ref.at[row, own, kv_head], k_smem, loaded)
            plgpu.copy_gmem_to_smem(v_ref.at[row, own, kv_head], v_smem, loaded)
            plgpu.barrier_wait(loaded)

            def accumulate(dk, dv):
                pipeline((dk, dv))
                return dk[...], dv[...]

            acc = plgpu.ACC((ROWS, head_dim), jnp.float32)
            dk, dv = pl.run_scoped(accumulate, acc, acc)
            for gradient, ref in (dk * scale, dk_ref), (dv, dv_ref):
                out_smem[...] = gradient.astype(partial.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, ref.at[row, own, part])
                plgpu.wait_smem_to_gmem(0)

        def visit(
            index, q_smem, do_smem, lse_smem, delta_smem,
            q_free, do_free, lse_free, delta_free, carry,
        ):  # fmt: skip
            step, _ = index
            dk, dv = carry
            shape = ROWS, query_tile
            score = _product(k_smem, q_smem.T, shape)
            lse = plgpu.load(lse_smem, layout=COLUMN)
            plgpu.barrier_arrive(lse_free)
            weight = jnp.exp2(score * (scale * LOG2_E) - _columns(lse, shape))

            def masked():
                # The bounds are read again: kept from before, they would not fit the registers.
                run, query = schedule.walk(_tiles(ranges_ref, row, number)[0], step)
                at = row, run, pl.ds(query * query_tile, query_tile)
                start, end = (
                    _columns(plgpu.load(x.at[at], layout=COLUMN, optimized=False), shape)
                    for x in (starts_ref, ends_ref)
                )
                key = own.start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
                return jnp.where((key >= start) & (key < end), weight, 0.0)

            weight = lax.cond(step < whole, lambda: weight, masked)

            def add_dv(acc):
                plgpu.wgmma(acc, v_smem, do_smem.T)
                plgpu.wgmma(dv, weight.astype(q.dtype), do_smem)
                return plgpu.wgmma_accumulator_load(acc, wait_n=1)

            d_weight = pl.run_scoped(add_dv, plgpu.ACC(shape, jnp.float32))
            delta = plgpu.load(delta_smem, layout=COLUMN)  # no earlier: registers are short
            plgpu.barrier_arrive(delta_free)
            d_score = (weight * (d_weight - _columns(delta, shape))).astype(q.dtype)
            plgpu.wgmma(dk, d_score, q_smem)
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(do_free)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(q_free)
            return dk, dv

        def at(step, member):
            return schedule.walk(tiles, step)[1], part * members + member

        block = query_tile, None, head_dim
        per_query = _spec(block, q.dtype, lambda i, member: (*at(i, member), 0))
        per_row = plgpu.BlockSpec((None, query_tile), lambda i, member: at(i, member)[::-1])
        grid = schedule.steps(tiles), members
        _pipeline(visit, compute, grid, [per_query, per_query, per_row, per_row])(
            *(x.at[row] for x in (q_ref, do_ref, lse_ref, delta_ref))
        )

    shape = WARPGROUPS, ROWS, head_dim
    smem, out_smem = _smem(shape, k.dtype), _smem(shape, partial.dtype)
    scratch = [smem, smem, out_smem, plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)]
    grid = kv_heads * parts, keys // key_tile, batch
    call = _launch(block_attention_key_gradients, (partial, partial), scratch, grid, interpret)
    gradients = call(q, k, v, do, lse, delta, starts, ends, ranges)
    if parts == 1:
        return gradients
    of_parts = batch, keys, kv_heads, parts, head_dim
    return tuple(x.reshape(of_parts).sum(3).astype(k.dtype) for x in gradients)


def _parts(programs: int, group: int) -> int:
    """Into how many parts a group is cut: programs differ in length, and few of them, one to a
    multiprocessor, would all wait for the longest."""
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if programs * n >= PROGRAMS), group)


def _launch(kernel, out_type, scratch_types, grid, interpret):
    """Grid: heads, tiles, rows of the batch; a program is the computing and one copying group."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=("heads", "tiles", "rows"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _over_queries(ranges_ref, group):
    """Where a warpgroup of a kernel over queries works: row, queries, heads; and its tiles."""
    row, number, pair, wg = map(lax.axis_index, ("rows", "tiles", "heads", "warpgroup"))
    number = ranges_ref.shape[1] - 1 - number  # later tiles of a half have more keys: they go first
    tiles, whole = _tiles(ranges_ref, row, number)
    kv_head = lax.div(pair, group // WARPGROUPS)  # the copying warpgroup has no head of its own
    return row, pl.ds(number * ROWS, ROWS), pair * WARPGROUPS + wg, kv_head, wg, tiles, whole


def _tiles(ranges_ref, row, number):
    """(run, from, to) of the tiles to visit, those without a mask first, and how many those are."""
    runs, bounds = ranges_ref.shape[2:]
    table = [
        [ranges_ref[row, number, run, bound] for bound in range(bounds)] for run in range(runs)
    ]
    whole = schedule.whole_tiles(table)
    return whole + schedule.masked_tiles(table), schedule.steps(whole)


def _pipeline(visit, compute, grid, specs):
    return plgpu.emit_pipeline_warp_specialized(
        visit,
        grid=grid,
        in_specs=specs,
        max_concurrent_steps=STAGES,
        num_compute_wgs=WARPGROUPS,
        memory_registers=COPY_REGISTERS,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=compute,
    )


def _inside(starts_ref, ends_ref, row, queries, tiles, step, key_tile):
    """Which keys of a step's tile the run of each query holds."""
    shape = ROWS, key_tile
    run, tile = schedule.walk(tiles, step)
    start, end = (
        _rows(plgpu.load(x.at[row, run, queries], layout=ROW, optimized=False), shape)
        for x in (starts_ref, ends_ref)
    )
    key = tile * key_tile + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
    return (key >= start) & (key < end)


def _product(a, b, shape):
    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _rows(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _columns(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def _transforms(dtype):
    """Tiles of 8 rows by 128 bytes, swizzled: what wgmma reads without bank conflicts."""
    elements = 128 // jnp.dtype(dtype).itemsize
    return (
        plgpu.TilingTransform((8, elements)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )


def _smem(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=_transforms(dtype))


def _spec(block, dtype, index_map):
    return plgpu.BlockSpec(block, index_map, transforms=_transforms(dtype))


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
