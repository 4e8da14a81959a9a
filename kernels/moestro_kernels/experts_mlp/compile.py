"""Compiles the Triton kernels ahead of time for real GPUs and shows what they take, with no GPU present.

    python -m moestro_kernels.experts_mlp.compile [--dtype bf16|fp16|fp32] [--json]

Targets: NVIDIA sm_80 and sm_90 (registers and spills out of the cubin, by the cuobjdump that Triton brings along), AMD
gfx942 (registers and spills out of the assembly's metadata). Shared memory is what the compiler allotted a block. The
table says that the kernels build and fit; it says nothing about their speed, which needs the hardware.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moestro_kernels.experts_mlp import gpu
from moestro_kernels.experts_mlp import triton as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (
    kernels.gate_up_swiglu_kernel,
    kernels.grouped_matmul_kernel,
    kernels.combine_kernel,
    kernels.scale_rows_kernel,
    kernels.swiglu_backward_kernel,
    kernels.weight_gradient_kernel,
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# stride_K = 1 is what the launcher specialises the down projection on.
CONSTANTS = {
    "BLOCK_P": gpu.BLOCK, "BLOCK_N": gpu.BLOCK, "BLOCK_K": gpu.BLOCK_K, "WEIGHTED": True, "GATHER": True, "stride_K": 1,
}  # fmt: skip
MATRIX_INSTRUCTIONS = ("wgmma", "mma.sync", "v_mfma")
INDEX_POINTERS = ("token_P", "tile_expert", "row_TK", "starts_E1")
_SIZES = frozenset({"T", "D", "F", "E", "K", "N", "I", "J", "stride_E", "stride_N"})
_STRIDES = ("stride_E", "stride_N")
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel takes on one target: registers a thread, spilled registers or bytes, shared bytes a block.

    `matrix_instruction` is the tensor-core instruction in its code, empty where there is none.
    """

    kernel: str
    target: str
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instruction: str


def compile_kernel(kernel: Any, target: str, dtype: str = "bf16") -> CompiledKernel:
    """Compiles one of KERNELS for one of TARGETS, for pointers and hidden sizes that are multiples of 16.

    Router weights and their gradient are fp32. Raises triton's CompilationError where the kernel does not build.
    """
    signature = {name: _type(name, dtype) for name in kernel.arg_names}
    constants = {name: CONSTANTS[name] for name, kind in signature.items() if kind == "constexpr"}
    attributes = {
        (position,): _ALIGNED
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in {"D", "F", "I", "J", "N", "K", *_STRIDES} and kernel in _MATMULS)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=TARGETS[target],
        options={"num_warps": gpu.num_warps(DTYPES[dtype]), "enable_fp_fusion": True},
    )
    registers, spills = (
        _amd_usage(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia_usage(compiled.asm["cubin"])
    )
    code = compiled.asm.get("amdgcn") or compiled.asm["ptx"]
    instruction = next((name for name in MATRIX_INSTRUCTIONS if name in code), "")
    return CompiledKernel(kernel.__name__, target, dtype, registers, spills, compiled.metadata.shared, instruction)


_MATMULS = (
    kernels.gate_up_swiglu_kernel,
    kernels.grouped_matmul_kernel,
    kernels.swiglu_backward_kernel,
    kernels.weight_gradient_kernel,
)


def _type(argument: str, dtype: str) -> str:
    if argument in CONSTANTS:
        return "constexpr"
    if argument in INDEX_POINTERS:
        return "*i64"
    if argument in {"weights_TK", "dweights_TK"}:
        return "*fp32"
    return "i32" if argument in _SIZES else f"*{dtype}"


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spills; the kernels have no arrays of their own)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a thread (accumulation registers among them) and spilled registers, vector and scalar."""
    spills = _number(r"\.vgpr_spill_count:\s*(\d+)", assembly) + _number(r"\.sgpr_spill_count:\s*(\d+)", assembly)
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), spills


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"No {pattern} in the compiler's output: {text[:500]}")
    return int(match.group(1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line a kernel and target; the exit code is 1 where anything spills."""
    parser = argparse.ArgumentParser(description="Compiles the grouped expert MLP's kernels without a GPU.")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = [compile_kernel(kernel, target, options.dtype) for kernel in KERNELS for target in TARGETS]
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        sys.stdout.write(
            f"{'kernel':26}{'target':8}{'dtype':7}{'registers':>10}{'spills':>8}{'shared bytes':>14}  matrix\n"
        )
        for row in rows:
            line = f"{row.kernel:26}{row.target:8}{row.dtype:7}{row.registers:10}{row.spills:8}{row.shared_bytes:14}"
            sys.stdout.write(f"{line}  {row.matrix_instruction or '-'}\n")
    return int(any(row.spills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
