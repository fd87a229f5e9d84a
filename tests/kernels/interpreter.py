"""Whether Triton's interpreter runs here."""

import numpy as np
import pytest

triton = pytest.importorskip("triton")
NEW_NUMPY = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
needs_interpreter = pytest.mark.skipif(
    triton.__version__ < "3.7" and NEW_NUMPY,
    reason="the interpreter of Triton 3.6 needs NumPy before 2.4",
)
