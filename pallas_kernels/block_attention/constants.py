"""Numbers that all softmaxes here share."""

import math

MASKED = -1e30
"""A hidden score: finite, so that no difference of two is NaN."""

LOG2_E = math.log2(math.e)
"""Softmax is computed in powers of two."""
