"""Training objectives by name. Each maps (model, batch, context) to a LossOutput."""

from collections.abc import Callable

from llada2_jax.objectives.ar import ar_objective
from llada2_jax.objectives.base import Context, LossOutput, Objective
from llada2_jax.objectives.bdlm import bdlm_objective, mdlm_objective
from llada2_jax.objectives.cap import cap_objective, with_supervised_per_masked
from llada2_jax.objectives.dpo import dpo_objective
from llada2_jax.types import Batch

OBJECTIVES: dict[str, Objective] = {
    "ar": ar_objective,
    "bdlm": bdlm_objective,
    "mdlm": mdlm_objective,
    "cap": cap_objective,
    "dpo": dpo_objective,
}

_WHOLE_BATCH: dict[str, Callable[[Batch, Context], Context]] = {"cap": with_supervised_per_masked}


def whole_batch_context(objective: str, batch: Batch, context: Context) -> Context:
    """The context with what an objective has to know of all the rows of a step, where it sees them
    in parts."""
    prepare = _WHOLE_BATCH.get(objective)
    return context if prepare is None else prepare(batch, context)


__all__ = ["OBJECTIVES", "Context", "LossOutput", "Objective", "whole_batch_context"]
