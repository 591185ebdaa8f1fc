"""Linear layers whose three GEMMs run in FP8, scaled by the operands' present magnitudes (dynamic scaling).

==================  ============  ============================  ==========================================
``scaling``         scales        forward pass                  gradients
==================  ============  ============================  ==========================================
tensor              1 per matrix  e4m3                          of the output e5m2, other operands e4m3
row                 1 per row     e4m3                          e4m3: a row's own scale gives it the range
==================  ============  ============================  ==========================================

A row is what a GEMM contracts: of tokens and output channels in the forward pass, of tokens and input channels for the
gradient of the input, of channels over all tokens for that of the weight. Nothing is kept between passes.
"""

from megadit_kernels.float8.products import Float8Products
from megadit_kernels.float8.transformer_engine import TransformerEngineProducts

__all__ = ["Float8Products", "TransformerEngineProducts"]
