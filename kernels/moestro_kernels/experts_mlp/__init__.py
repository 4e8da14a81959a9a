"""The grouped expert MLP: reference, CPU path, Triton kernels, and the adapter to transformers.

`reference.py` is the truth in a few lines; `plan.py` sorts choices by expert; `cpu.py` and `gpu.py` (on the kernels of
`triton.py`) are the fast paths; `op.py` picks one by device; `adapter.py` registers the op with transformers;
`compile.py` compiles the kernels ahead of time for real GPUs; `bench.py` times the op against transformers' own.
"""

from moestro_kernels.experts_mlp.op import experts_mlp
from moestro_kernels.experts_mlp.reference import experts_mlp_reference

__all__ = ["experts_mlp", "experts_mlp_reference", "register"]


def register() -> None:
    """Registers the experts implementation "moestro" with transformers' ALL_EXPERTS_FUNCTIONS (any number of times)."""
    from moestro_kernels.experts_mlp import adapter

    adapter.register()
