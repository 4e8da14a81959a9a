"""Moestro's kernels: operators of Mixture-of-Experts layers that stand on torch, Triton and transformers alone.

One folder an operator, the same files in each:

    reference.py   a few lines of PyTorch that say what the operator is: the truth the others are tested against
    cpu.py         the fast path on a CPU
    triton.py      the raw Triton kernels; gpu.py launches them as `torch.library` operators
    op.py          the one differentiable function that callers use; it chooses the path by device
    adapter.py     where another library calls the operator: its registration there
    compile.py     `python -m moestro_kernels.<operator>.compile`: ahead-of-time compilation for GPUs that are not here
    bench.py       `bench()`, which times the operator against its rivals with `moestro_kernels.timing`

`products.py` holds the matrix product that CPU paths, and linear layers in training, are made of; `vector_math.py`
keeps elementwise functions from being computed at low precision in a process's first moments.

So a caller composes `op` functions or registers an adapter, and never needs to know the device. `experts_mlp` is the
grouped SwiGLU MLP of all experts of a layer.
"""
