"""The Triton kernels of the grouped expert MLP: in the interpreter against the naive loop, and compiled for real GPUs.

Triton decides at import whether kernels are interpreted, so this file runs itself once as a script with
TRITON_INTERPRET=1 and reads the errors from its output.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from moestro_kernels.experts_mlp import experts_mlp_reference

pytestmark = pytest.mark.slow

# (T, K, E, D, F): one token and top-1; sizes past one tile and no multiple of one; an expert of more than one tile.
# Expert 0 is always empty.
SHAPES = [(1, 1, 3, 16, 16), (4, 2, 5, 70, 66), (90, 1, 2, 24, 20)]
NAMES = ("y", "dx", "dweights", "dgate_up", "ddown")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def _cases():
    return [(shape, "float32") for shape in SHAPES] + [(SHAPES[2], "float16")]


def _inputs(shape, dtype):
    num_tokens, top_k, num_experts, hidden, intermediate = shape
    torch.manual_seed(0)
    index_TK = 1 + torch.rand(num_tokens, num_experts - 1).topk(top_k).indices
    x_TD = torch.randn(hidden, num_tokens, dtype=dtype).t()
    weights_TK = torch.randn(num_tokens, top_k).softmax(-1)
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, dtype=dtype) / hidden**0.5
    down = torch.randn(num_experts, hidden, intermediate, dtype=dtype) / intermediate**0.5
    return index_TK, [x_TD, weights_TK, gate_up, down]


def _run(function, index_TK, tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y_TD = function(leaves[0], index_TK, *leaves[1:])
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y_TD.backward(dy_TD.to(y_TD))
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]


def _interpret():
    """Runs in the script: the largest relative error of each output and gradient, and how often bits differ."""
    from moestro_kernels.experts_mlp import gpu

    torch.set_num_threads(1)
    results = []
    for shape, dtype in _cases():
        index_TK, tensors = _inputs(shape, DTYPES[dtype])
        exact = _run(experts_mlp_reference, index_TK, [tensor.double() for tensor in tensors])
        first = _run(gpu.experts_mlp_gpu, index_TK, tensors)
        errors = [
            ((a - e).abs().max() / e.abs().max().clamp_min(1e-30)).item() for a, e in zip(first, exact, strict=True)
        ]
        second = _run(gpu.experts_mlp_gpu, index_TK, tensors) if shape == SHAPES[0] else first
        repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results.append({"errors": errors, "dtypes": [str(t.dtype) for t in first], "repeats": repeats})
    index_TK, tensors = _inputs(SHAPES[0], torch.float32)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gpu._forward, (leaves[0], index_TK, *leaves[1:]), test_utils=checks)
    saved = gpu._forward(tensors[0], index_TK, *tensors[1:])[1:]
    for frozen in (True, False):
        arguments = (tensors[0].clone(), tensors[0], *tensors[1:], *saved, not frozen, frozen)
        torch.library.opcheck(gpu._backward, arguments, test_utils=("test_schema", "test_faketensor"))
    try:
        gpu.experts_mlp_gpu(leaves[0].bfloat16(), index_TK, leaves[1], leaves[2].bfloat16(), leaves[3].bfloat16())
    except ValueError as error:
        return {"cases": results, "bf16": str(error)}
    return {"cases": results, "bf16": "accepted"}


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(_cases())), ids=[f"{shape} {dtype}" for shape, dtype in _cases()])
def test_interpreted_kernels_match_the_naive_loop(interpreted, case):
    result, dtype = interpreted["cases"][case], _cases()[case][1]
    tolerance = 2e-6 if dtype == "float32" else 4e-3
    assert max(result["errors"]) < tolerance, dict(zip(NAMES, result["errors"], strict=True))
    assert result["dtypes"] == [f"torch.{name}" for name in (dtype, dtype, "float32", dtype, dtype)]
    assert result["repeats"]


def test_interpreter_refuses_bf16_rather_than_return_nonsense(interpreted):
    assert "bf16" in interpreted["bf16"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_ahead_of_time_without_spills(target, dtype):
    from moestro_kernels.experts_mlp.compile import KERNELS, compile_kernel

    rows = [compile_kernel(kernel, target, dtype) for kernel in KERNELS]
    assert [row.spills for row in rows] == [0] * len(KERNELS)
    assert all(0 < row.registers <= (512 if target == "gfx942" else 255) for row in rows)
    assert all(row.shared_bytes <= (65536 if target == "gfx942" else 101376) for row in rows)
    if dtype == "bf16":
        matmuls = {row.matrix_instruction for row in rows if row.kernel not in {"combine_kernel", "scale_rows_kernel"}}
        assert matmuls == {{"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}[target]}


def test_compile_command_prints_a_table(capsys):
    from moestro_kernels.experts_mlp.compile import KERNELS, TARGETS, main

    assert main(["--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["kernel", "target", "dtype", "registers"]
    assert len(lines) == 1 + len(KERNELS) * len(TARGETS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu_match_the_naive_loop(dtype):
    from moestro_kernels.experts_mlp import experts_mlp

    index_TK, tensors = _inputs((300, 2, 8, 200, 136), dtype)
    exact = _run(experts_mlp_reference, index_TK, [tensor.double() for tensor in tensors])
    index_TK, tensors = index_TK.cuda(), [tensor.cuda() for tensor in tensors]
    actual = _run(experts_mlp, index_TK, tensors)
    for a, e in zip(actual, exact, strict=True):
        assert ((a.cpu() - e).abs().max() / e.abs().max()).item() < (1e-5 if dtype == torch.float32 else 3e-2)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_interpret()) + "\n")
