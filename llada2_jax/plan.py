"""`llada2 plan`: does a run fit a slice, on what mesh, how fast at best; before money is spent.

The true training step and validation are compiled by libtpu for the slice, which needs no TPU:
bytes are the compiler's. FLOPs, traffic and time are computed (costs.py). GPUs cannot be compiled
for here: their memory is computed too, and the table says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from llada2_jax.adapters import check_modules, split_trained
from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.config import ConfigError, MeshConfig, NoiseConfig, Phase, TrainConfig
from llada2_jax.config_check import configured_model, validate
from llada2_jax.config_flags import parse_flags
from llada2_jax.costs import (
    ASSUMPTIONS,
    BOTH_HALVES,
    Roofline,
    Workload,
    link_bytes,
    roofline,
    validation_bytes,
    working_bytes,
)
from llada2_jax.decode_plan import Requests, plan_decoding, print_decoding
from llada2_jax.device_memory import Memory, compiled_bytes, gib
from llada2_jax.errors import EXIT_STATUS, UsageError
from llada2_jax.evals.likelihood import preference_context, validation_contexts
from llada2_jax.evals.validation import validated
from llada2_jax.hardware import CHIPS, Slice, slice_named, slices_of
from llada2_jax.hub import load_bundle
from llada2_jax.model import build
from llada2_jax.optimizer import make_optimizer
from llada2_jax.progress import bar
from llada2_jax.sharding import (
    AXES,
    RULES,
    Placement,
    batch_sharding,
    check_cut,
    check_mesh,
    make_mesh,
    mesh_sizes,
    placements,
)
from llada2_jax.train_step import (
    TrainState,
    abstract_state,
    eval_program,
    make_context,
    make_train_step,
)
from llada2_jax.types import Batch, ModelConfig
from pallas_kernels.aot import topology_devices

Sizes = dict[str, int]

MESHES: dict[tuple[str, str], Sizes] = {
    ("mini", "v5litepod-8"): {"expert": 4, "context": 2},
    ("mini", "v5litepod-16"): {"fsdp": 4, "expert": 4},
    ("mini", "v6e-8"): {"fsdp": 2, "expert": 4},
    ("mini", "v5p-8"): {"fsdp": 1, "expert": 4},
    ("flash", "v5p-32"): {"fsdp": 2, "expert": 8},
    ("flash", "v6e-64"): {"fsdp": 8, "expert": 8},
    ("flash", "v5litepod-256"): {"fsdp": 32, "expert": 8},
    ("flash", "v5p-128"): {"fsdp": 2, "expert": 8, "context": 4},
}
"""Meshes of the slices in docs/plan.md; for others the roofline chooses."""

COMPILED_CANDIDATES = 3
"""Meshes of a slice that --search compiles before it takes a larger slice: the fastest ones, and
the one that should need least memory."""


@dataclasses.dataclass(frozen=True)
class State:
    """Abstract parameters, those of them that are trained, their moments, and what a reference
    holds on the devices beside them; what a mesh makes of them is cheap to ask."""

    params: Any
    trained: Any
    moments: Any
    reference: Any

    def on(self, sizes: Mapping[str, int]) -> dict[str, list[Placement]]:
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: placements(part, mesh) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a slice. work: the phase that was looked at, on the mesh."""

    slice: Slice
    work: Workload
    memory: Memory
    roofline: Roofline
    links: dict[str, float]

    @property
    def overrides(self) -> list[str]:
        """The flags that make `llada2 train` run this."""
        default = dataclasses.asdict(MeshConfig())
        flags = [
            f"--config.mesh.{axis}={size}"
            for axis, size in self.work.sizes.items()
            if default[axis] not in (size, -1)
        ]
        if self.work.micro_batches > 1:
            flags.append(f"--config.optimizer.accumulate={self.work.micro_batches}")
        return flags

    def record(self) -> dict[str, Any]:
        """What --json prints; bytes are a device's, seconds a step's."""
        work, roof, flops = self.work, self.roofline, self.work.flops
        return {
            "slice": self.slice.name,
            "chips": self.slice.chips,
            "mesh": {axis: size for axis, size in work.sizes.items() if size > 1},
            "accumulate": work.micro_batches,
            "rows_per_step": work.cfg.data.rows_per_step,
            "row_length": work.cfg.data.row_length,
            "objective": work.objective,
            "block_size": work.block_size,
            "expert_buffer": _expert_buffer(work),
            **self.memory.record(),
            "model_flops_per_token": {**flops, "all": sum(flops.values())},
            "link_bytes": {axis: size for axis, size in self.links.items() if size},
            "seconds": {
                "compute": roof.compute,
                "memory": roof.memory,
                "links": roof.links,
                "best": roof.best,
                "in_turn": roof.in_turn,
            },
            "tokens_per_second": {
                "best": roof.tokens / roof.best,
                "in_turn": roof.tokens / roof.in_turn,
            },
            "mfu": {"best": roof.mfu(roof.best), "in_turn": roof.mfu(roof.in_turn)},
            "assumptions": list(ASSUMPTIONS),
            "train_flags": self.overrides,
        }


def _expert_buffer(work: Workload) -> float:
    """Room for pairs of tokens and experts, in units of a balanced load."""
    return work.expert_rows / (work.positions * work.model.experts_per_token)


# ---- what is planned -----------------------------------------------------------------------------


def planned_model(cfg: TrainConfig) -> ModelConfig:
    """The model that the run trains, with kernels and dtypes as it runs on an accelerator.

    Raises: ConfigError if neither the checkpoint nor config.init.architecture tells its shapes, or
      adapters are for a module that it lacks.
    """
    model = _planned_model(cfg)
    if not cfg.lora.rank:
        return model
    check_modules(model, cfg.lora)
    return dataclasses.replace(model, lora=cfg.lora)


def _planned_model(cfg: TrainConfig) -> ModelConfig:
    if cfg.model:
        return configured_model(cfg)
    runtime = dataclasses.asdict(cfg.runtime)
    if Path(cfg.init.checkpoint).is_dir():
        return dataclasses.replace(load_bundle(cfg.init.checkpoint).config, **runtime)
    if cfg.init.architecture:
        return dataclasses.replace(ARCHITECTURES[cfg.init.architecture], **runtime)
    raise ConfigError(
        f"config.init.checkpoint={cfg.init.checkpoint!r} is not there to tell the model's shapes: "
        f"set config.init.architecture to one of {', '.join(ARCHITECTURES)}"
    )


def planned_phase(cfg: TrainConfig, name: str = "") -> Phase:
    """The phase called `name`, or the one that takes most: both halves before one, and of those the
    longest. Raises: ConfigError for a name that no phase has."""
    if name:
        found = [phase for phase in cfg.phases if phase.name == name]
        if not found:
            names = ", ".join(phase.name for phase in cfg.phases)
            raise ConfigError(f"--phase={name}: the config's phases are {names}")
        return found[0]
    return max(cfg.phases, key=lambda phase: (phase.objective in BOTH_HALVES, phase.tokens))


def abstract_run(cfg: TrainConfig, model: ModelConfig, phase: Phase) -> State:
    """Shapes of what the run holds in a phase; nothing is allocated."""
    params = build(model)[1]
    trained = split_trained(params)[0]
    moments = jax.eval_shape(make_optimizer(cfg.of_step).init, trained)
    return State(params, trained, moments, _abstract_reference(cfg, model, phase))


def _abstract_reference(cfg: TrainConfig, model: ModelConfig, phase: Phase) -> Any:
    """The reference's own parameters, where they stay on the devices; as large as the policy."""
    cached, in_host = bool(cfg.reference.cache), cfg.reference.memory == "host"
    shared = cfg.lora.rank and not cfg.reference.checkpoint
    if phase.objective != "dpo" or cached or in_host or shared:
        return {}
    return build(dataclasses.replace(model, lora=None))[1]


def on_mesh(cfg: TrainConfig, model: ModelConfig, sizes: Mapping[str, int]) -> TrainConfig:
    """The run on a mesh. One row a micro-batch for each group of devices that shares rows, unless
    config.optimizer.accumulate says otherwise.

    Raises: ConfigError for a mesh that the model or the rows do not divide among.
    """
    ways = math.prod(sizes[axis] for axis in RULES["batch"])
    accumulate = cfg.optimizer.accumulate
    if accumulate == 1:
        accumulate = max(1, cfg.data.rows_per_step // ways)
    cfg = dataclasses.replace(
        cfg,
        mesh=MeshConfig(**sizes),
        optimizer=dataclasses.replace(cfg.optimizer, accumulate=accumulate),
    )
    check_mesh(cfg, model, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    return cfg


def meshes(cfg: TrainConfig, model: ModelConfig, devices: int) -> Iterator[Sizes]:
    """Meshes that could be: experts over up to 16 devices, rows of 16k tokens or more over up to 8,
    heads over up to 4, layers in up to 4 stages, the rest fsdp. Not data: copies of the parameters
    take memory, and within a TPU slice save no traffic."""
    contexts = (1, 2, 4, 8) if cfg.data.row_length >= 16384 else (1,)
    for chosen in itertools.product((1, 2, 4, 8, 16), contexts, (1, 2, 4), (1, 2, 4)):
        fsdp, rest = divmod(devices, math.prod(chosen))
        sizes = dict(zip(("expert", "context", "model", "stage"), chosen, strict=True))
        sizes = dict.fromkeys(AXES, 1) | sizes | {"fsdp": fsdp}
        if sizes["stage"] > max(1, model.num_moe_layers):
            continue
        if not rest and fsdp and _divides(cfg, model, sizes):
            yield sizes


def _divides(cfg: TrainConfig, model: ModelConfig, sizes: Sizes) -> bool:
    try:
        on_mesh(cfg, model, sizes)
    except ConfigError:
        return False
    return True


# ---- one plan ------------------------------------------------------------------------------------


def computed_plan(
    cfg: TrainConfig, model: ModelConfig, state: State, phase: Phase, slice_: Slice, sizes: Sizes
) -> Plan:
    """A plan without a compiler: memory is a sum of what must be there."""
    cfg = on_mesh(cfg, model, sizes)
    work = Workload(cfg, model, sizes, phase.objective, phase.block_size)
    places = state.on(sizes)
    params, trained = places["params"], places["trained"]
    held = {
        "parameters": _bytes(params),
        # Offloaded, they rest in the host's memory.
        "moments": 0.0 if cfg.optimizer.offload else _bytes(places["moments"]),
    }
    if places["reference"]:
        held["reference"] = _bytes(places["reference"])
    parts = working_bytes(work, params, trained)
    validation = sum(held.values()) + validation_bytes(validation_work(work), params)
    limit = slice_.chip.usable_bytes
    memory = Memory(held, sum(parts.values()), parts, limit, validation)
    roof = roofline(work, params, sum(held.values()), slice_, trained)
    return Plan(slice_, work, memory, roof, link_bytes(work, params, trained))


def validation_work(work: Workload) -> Workload:
    """What a run validates: rows of a micro-batch under the phase's kind of validation, and experts
    with room for all. DPO is validated under the run's noise, all else under the bound's."""
    cfg = work.cfg
    objective, block_size = validated(cfg, work.objective, work.block_size)
    cfg = dataclasses.replace(
        cfg,
        noise=cfg.noise if objective == "dpo" else NoiseConfig(),
        dpo=dataclasses.replace(cfg.dpo, samples=cfg.eval.samples),
    )
    model = work.model.with_room_for_all
    return Workload(cfg, model, work.sizes, objective, block_size)


def _bytes(places: Sequence[Placement]) -> float:
    return float(sum(place.bytes_per_device for place in places))


def compiled_plan(plan: Plan) -> Plan:
    """The plan with bytes of the step, and of validation if that fits, from the TPU's compiler.

    Raises: FileNotFoundError where libtpu is not; what the compiler raises, but for too little
      memory, which the plan then says.
    """
    work, cfg = plan.work, plan.work.cfg
    mesh = make_mesh(cfg.mesh, topology_devices(plan.slice.libtpu_name))
    model = work.model.for_tpu
    start = time.perf_counter()
    state = abstract_state(cfg.of_step, model, mesh)
    check_cut(placements((state.params, state.opt_state), mesh), mesh)
    context = make_context(cfg, work.block_size, mask_id=0)
    step = make_train_step(cfg.of_step, model, work.objective, mesh)
    batch = _abstract_batch(cfg.data.rows_per_step, cfg.data.row_length, work.objective, mesh)
    lowered = step.lower(state, batch, context)
    held = plan.memory.state
    # The step takes no reference: that is a program of its own, whose parameters stay meanwhile.
    taken = sum(size for kind, size in held.items() if kind != "reference")
    needed, beside = compiled_bytes(lowered), sum(held.values())
    validation = 0.0
    if needed + beside - taken <= plan.memory.limit:
        validation = compiled_bytes(_lowered_validation(plan, model, mesh, state))
        validation += beside - held["parameters"]
    seconds = time.perf_counter() - start
    memory = plan.memory.compiled_to(needed, taken, seconds, validation)
    return dataclasses.replace(plan, memory=memory)


def _lowered_validation(
    plan: Plan, model: ModelConfig, mesh: jax.sharding.Mesh, state: TrainState
) -> jax.stages.Lowered:
    """Validation of the phase, which takes as many rows as a micro-batch."""
    work = plan.work
    cfg, rows = work.cfg, work.cfg.data.rows_per_step // work.micro_batches
    validation = validation_work(work)
    objective, block_size = validation.objective, validation.block_size
    if objective == "dpo":
        context = preference_context(cfg, mask_id=0)
    else:
        (context,) = validation_contexts(block_size, mask_id=0, samples=1)
    batch = _abstract_batch(rows, cfg.data.row_length, objective, mesh)
    return eval_program(model, objective, mesh).lower(state.model_params, batch, context)


def _abstract_batch(rows: int, length: int, objective: str, mesh: jax.sharding.Mesh) -> Batch:
    def field(dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))

    names = ("tokens", "segment_ids", "positions", "document_ids", "document_positions", "visits")
    batch = Batch(**{name: field() for name in names}, loss_mask=field(np.bool_))
    if objective != "dpo":
        return batch
    return dataclasses.replace(batch, preference=field(), reference=field(np.float32))


def plan_run(cfg: TrainConfig, slice_: Slice, *, phase: str = "", compiled: bool = True) -> Plan:
    """The plan of a run on a slice: on config.mesh if that says anything, else on the table's mesh
    if rows and model divide among it, else on the fastest one that should fit."""
    model, chosen = planned_model(cfg), planned_phase(cfg, phase)
    state = abstract_run(cfg, model, chosen)
    plan = next(iter(_ranked(cfg, model, state, chosen, slice_)))
    return compiled_plan(plan) if compiled and slice_.chip.kind == "tpu" else plan


def _ranked(
    cfg: TrainConfig, model: ModelConfig, state: State, phase: Phase, slice_: Slice
) -> list[Plan]:
    """Plans of a slice, computed: those that should fit first, then by time."""
    known = dict.fromkeys(AXES, 1) | MESHES.get((cfg.init.architecture, slice_.name), {})
    if cfg.mesh != MeshConfig():
        found = [mesh_sizes(cfg.mesh, slice_.devices)]
    elif math.prod(known.values()) == slice_.devices and _divides(cfg, model, known):
        found = [known]
    else:
        found = list(meshes(cfg, model, slice_.devices))
    if not found:
        raise ConfigError(
            f"no mesh of {slice_.devices} devices divides config.data.rows_per_step="
            f"{cfg.data.rows_per_step} and the model: change the rows, or set config.mesh"
        )
    plans = [computed_plan(cfg, model, state, phase, slice_, sizes) for sizes in found]
    return sorted(plans, key=lambda plan: (not plan.memory.fits, plan.roofline.in_turn))


# ---- search --------------------------------------------------------------------------------------


def search(
    cfg: TrainConfig, slices: Sequence[Slice], *, phase: str = "", compiled: bool = True
) -> Iterator[Plan]:
    """Plans from the smallest slice up, until one fits, which is the last.

    A slice is passed over without compiling where state and gradients alone are too much.
    """
    model, chosen = planned_model(cfg), planned_phase(cfg, phase)
    state = abstract_run(cfg, model, chosen)
    for slice_ in sorted(slices, key=lambda s: s.chips * s.chip.flops):
        try:
            plans = _ranked(cfg, model, state, chosen, slice_)
        except ConfigError:
            continue  # rows do not divide among so many devices
        possible = [plan for plan in plans if _least(plan) <= plan.memory.limit]
        for plan in _candidates(possible):
            found = compiled_plan(plan) if compiled and slice_.chip.kind == "tpu" else plan
            yield found
            if found.memory.fits:
                return


def _candidates(plans: list[Plan]) -> list[Plan]:
    """Of a slice's plans, fastest first, those worth compiling."""
    fastest, rest = plans[: COMPILED_CANDIDATES - 1], plans[COMPILED_CANDIDATES - 1 :]
    return fastest + sorted(rest, key=lambda plan: plan.memory.needed)[:1]


def _least(plan: Plan) -> float:
    return sum(plan.memory.state.values()) + plan.memory.parts["gradients"]


# ---- the command ---------------------------------------------------------------------------------


def _shown(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as tables for people."""
    work, memory = plan.work, plan.memory
    console.print(
        f"{plan.slice.name}: {plan.slice.chips} chips, mesh {_shown(work.sizes)}; "
        f"{work.objective}, blocks of {work.block_size}, rows of {work.cfg.data.row_length}, "
        f"{work.cfg.data.rows_per_step} a step in {work.micro_batches} micro-batches; room for "
        f"{_expert_buffer(work):g} x a balanced load of experts"
    )
    console.print(memory.table())
    if memory.compiled:
        console.print(f"compiled in {memory.seconds:.0f} s")
    _print_time(plan, console)
    row, longest = work.cfg.data.row_length, work.model.max_position_embeddings
    if row > longest:
        console.print(
            f"Rows of {row} are beyond max_position_embeddings={longest} of the architecture that "
            "was planned with: llada2 train takes them if the checkpoint's config.json says more"
        )
    if plan.overrides:
        console.print(f"llada2 train ... {' '.join(plan.overrides)}")


def _print_time(plan: Plan, console: Console) -> None:
    work, roof = plan.work, plan.roofline
    flops = work.flops
    table = Table(title="Model FLOPs of a clean token, forward and backward", title_justify="left")
    table.add_column("part")
    table.add_column("GFLOP", justify="right")
    for part, count in {**flops, "all": sum(flops.values())}.items():
        table.add_row(part, f"{count / 1e9:.2f}")
    console.print(table)
    table = Table(title="Roofline of a step", title_justify="left")
    for column in ("limit", "received by a device", "seconds"):
        table.add_column(column, justify="left" if column == "limit" else "right")
    table.add_row("compute", "", f"{roof.compute:.3f}")
    table.add_row("memory", "", f"{roof.memory:.3f}")
    for axis, seconds in roof.links.items():
        table.add_row(f"links, {axis}", f"{gib(plan.links[axis])} GiB", f"{seconds:.3f}")
    for name, seconds in (("all overlap", roof.best), ("links in turn", roof.in_turn)):
        rate = f"{roof.tokens / seconds:,.0f} tokens/s, MFU {roof.mfu(seconds):.1%}"
        table.add_row(name, rate, f"{seconds:.3f}", style="bold")
    console.print(table)
    console.print("Bounds, not measurements. Assumed: " + "; ".join(ASSUMPTIONS) + ".", style="dim")


def print_search(plans: Sequence[Plan], console: Console) -> None:
    """What the search tried, in its order; the last line is the answer if it fits."""
    room = f"room for {_expert_buffer(plans[0].work):g} x a balanced load of experts"
    table = Table(title=f"Smallest slice first; {room}", title_justify="left")
    for column in ("slice", "mesh", "peak GiB", "of", "fits", "tokens/s", "MFU", "compiled in"):
        table.add_column(column, justify="left" if column in ("slice", "mesh") else "right")
    for plan in plans:
        roof, memory = plan.roofline, plan.memory
        table.add_row(
            plan.slice.name,
            _shown(plan.work.sizes),
            gib(memory.needed),
            gib(memory.limit),
            "yes" if memory.fits else "no",
            f"{roof.tokens / roof.in_turn:,.0f} - {roof.tokens / roof.best:,.0f}",
            f"{roof.mfu(roof.in_turn):.0%} - {roof.mfu(roof.best):.0%}",
            f"{memory.seconds:.0f} s" if memory.compiled else "not",
        )
    console.print(table)


def main(argv: list[str]) -> int:
    """`llada2 plan`."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP)
        return 0 if argv else 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the slice is described, not here
    values = parse_flags(
        "llada2 plan",
        argv,
        switches={
            "search": (False, "the smallest slice that fits"),
            "json": (False, "records"),
            "compile": (True, "ask libtpu; --nocompile: compute memory instead"),
        },
        slice="the cloud's name of a slice",
        phase="a phase of the config",
        decode="a batch of requests to decode instead: ROWS,PROMPT,NEW[,BLOCK]",
    )
    if values.print_config:
        print(values.config)
        return 0
    cfg = validate(values.config)
    if values.search and not values.decode:
        return _search_command(cfg, values)
    if not values.slice:
        raise UsageError("--slice is missing: name one, e.g. v5p-32, or give --search")
    if values.decode:
        return _decode_command(cfg, values)
    plan = plan_run(cfg, slice_named(values.slice), phase=values.phase, compiled=values.compile)
    if values.json:
        print(json.dumps(plan.record(), indent=1))
    else:
        print_plan(plan, Console(width=100))
    return 0 if plan.memory.fits else 3


def _decode_command(cfg: TrainConfig, values: Any) -> int:
    if values.search:
        raise UsageError("--search looks for a slice to train on: leave it out with --decode")
    requests, slice_ = Requests.parse(values.decode), slice_named(values.slice)
    plan = plan_decoding(planned_model(cfg), requests, slice_, compiled=values.compile)
    if values.json:
        print(json.dumps(plan.record(), indent=1))
    else:
        print_decoding(plan, Console(width=100))
    return 0 if plan.memory.fits else 3


def _search_command(cfg: TrainConfig, values: Any) -> int:
    """slice: only slices of its chip."""
    chips = [slice_named(values.slice).chip] if values.slice else CHIPS.values()
    slices = [s for chip in chips if values.slice or chip.kind == "tpu" for s in slices_of(chip)]
    found = []
    with bar(what="plans", unit="plan", delay=0) as shown:
        for plan in search(cfg, slices, phase=values.phase, compiled=values.compile):
            found.append(plan)
            shown.set_postfix_str(f"{plan.slice.name}: {gib(plan.memory.needed)} GiB")
            shown.update()
    if not found:
        names = [s.name for s in slices]
        raise ConfigError(
            f"--search: none of {len(names)} slices, {names[0]} to {names[-1]}, can hold the run: "
            "on each, its parameters, moments and gradients alone are too much, or "
            f"config.data.rows_per_step={cfg.data.rows_per_step} does not divide among the devices"
        )
    if values.json:
        print(json.dumps([plan.record() for plan in found], indent=1))
    else:
        print_search(found, Console(width=120))
        if found[-1].memory.fits:
            print_plan(found[-1], Console(width=100))
    return 0 if found[-1].memory.fits else 3


_HELP = f"""\
usage: llada2 plan --config=configs/NAME.py --slice=NAME [--config.FIELD=VALUE ...]
                   [--phase=NAME | --decode=ROWS,PROMPT,NEW[,BLOCK]] [--search] [--json]
                   [--nocompile]

Whether a run fits a slice, on what mesh, and how fast at best. Compiles the training step and
validation for the slice with libtpu on this machine (minutes; `make .cache/libtpu/libtpu/libtpu.so`
fetches it).

  --slice=NAME     v5litepod-16, v5p-32, v6e-64, tpu7x-16, h100-80gb-8, ... as the cloud calls it
  --config.mesh.fsdp=N, .expert=N, ...   this mesh instead of the table's or the fastest
  --phase=NAME     a phase of the schedule (default: the one that takes most)
  --decode=8,4096,1024   the generation program instead of the training step: on each device 8
                   prompts of 4096 tokens, 1024 to generate, in blocks of 32
  --search         the smallest slice that fits, of --slice's chip, or of all TPUs
  --nocompile      computed memory instead of the compiler's; always so for GPUs
  --json           records for programs

{EXIT_STATUS}3 where the run does not fit.
"""
