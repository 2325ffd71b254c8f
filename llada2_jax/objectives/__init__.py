"""Training objectives by name. Each maps (model, batch, context) to a LossOutput."""

from llada2_jax.objectives.ar import ar_objective
from llada2_jax.objectives.base import Context, LossOutput, Objective
from llada2_jax.objectives.bdlm import bdlm_objective, mdlm_objective
from llada2_jax.objectives.dpo import dpo_objective

OBJECTIVES: dict[str, Objective] = {
    "ar": ar_objective,
    "bdlm": bdlm_objective,
    "mdlm": mdlm_objective,
    "dpo": dpo_objective,
}

__all__ = ["OBJECTIVES", "Context", "LossOutput", "Objective"]
