"""How hard the fuzz tests search, and the values that they share.

The tests repeat the same few cases each time. With FUZZ_EXAMPLES=5000 (`make fuzz`) they draw new
ones for minutes; what they find is kept as an @example.
"""

import os

from hypothesis import settings
from hypothesis import strategies as st

_examples = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(max_examples=int(_examples or 60), derandomize=not _examples, deadline=None)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
