"""The GPU implementation in Triton: no host synchronisation, fp32 sums, activation fused into the grouped GEMM.

Values are the reference's up to rounding, and the same bits every time: no kernel adds atomically. With
``TRITON_INTERPRET=1`` set before this package is imported, the same kernels run on a CPU, slowly, which the tests use.
"""

from mtmoe.kernels.triton.grouped_linear import grouped_linear
from mtmoe.kernels.triton.permute import combine, dispatch

__all__ = ["combine", "dispatch", "grouped_linear"]
