"""Looking into traced functions."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def equations_of(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation of a function, and of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations_of(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _is_jaxpr(x) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)
