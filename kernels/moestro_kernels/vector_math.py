"""`settle_vector_math`: elementwise functions of a process are as precise the first time they are called as ever after.

On a CPU with MKL PyTorch computes exp, cos, sqrt and their like with its vector functions, on several threads. The MKL
in PyTorch's builds (2024.2) chooses a kernel when such a function is called first, and if several threads call it at
once, one of them may get one of low precision for its share. That is rare, comes about on busy machines
(pytorch/pytorch#188792), and stays where a result is kept, such as vLLM's table of rotary cosines: a model server then
has log-probabilities that are off beyond rounding until it is started again.
"""

import functools

import torch

FUNCTIONS = (
    "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2",
    "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
"""Names in torch of what MKL computes, or may in another build."""


@functools.cache
def settle_vector_math() -> None:
    """Call each function once on one element, so on one thread, in float32 and float64.

    Call it in a process before several threads compute shares of a tensor; further calls cost nothing. vLLM calls it
    in each of its processes, as a plugin.
    """
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(half)
