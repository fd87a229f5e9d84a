"""Whether Triton's interpreter runs here."""

import numpy as np
import pytest

triton = pytest.importorskip("triton")


def minor(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


needs_interpreter = pytest.mark.skipif(
    minor(triton) < (3, 7) and minor(np) >= (2, 4),
    reason="the interpreter of Triton 3.6 needs NumPy before 2.4",
)
