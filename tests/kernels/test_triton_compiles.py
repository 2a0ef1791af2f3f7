"""The Triton kernels compile for Hopper, without a GPU: what the interpreter cannot say.

Loads and stores of whole blocks must be 16 bytes wide and nothing may spill: both decide the speed of a pass
that is bound by memory.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_bvpo.kernels import triton_logprob as kernels

def build(function, signature, block, aligned, warps, **constants):
    names = function.arg_names
    constants["BLOCK"] = block
    signature = dict(zip(names, signature.split())) | dict.fromkeys(constants, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned.split()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = kernel.asm["ptx"]
    wide = ["ld.global.v4.b32" in ptx, "st.global.v4.b32" in ptx, ".local" in ptx]
    print(function.__name__, *(str(int(x)) for x in wide))

for dtype in ("*bf16", "*fp32"):
    for write in (True, False):
        # `columns` not aligned: an odd vocabulary
        build(kernels._exp_pass, f"*fp32 *fp32 *i64 *fp32 {dtype} i32 i32 i32 i32", kernels.PASS_BLOCK,
              "logits_ptr exp_ptr logits_stride exp_stride", kernels.PASS_WARPS, WRITE=write)
    build(kernels._grad_pass, f"*fp32 *fp32 *i64 *fp32 *fp32 {dtype} i32 i32 i32", kernels.PASS_BLOCK,
          "logits_ptr grad_ptr columns logits_stride grad_stride", kernels.PASS_WARPS)
    build(kernels._target_logit, f"{dtype} {dtype} *i64 *fp32 i32 i32 i32 i32", 1024,
          "x_ptr weight_ptr hidden x_stride weight_stride", 4)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("TRITON_INTERPRET", None)
    out = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    lines = [line.split() for line in out.stdout.splitlines() if line.startswith("_")]
    passes = [line for line in lines if line[0] in ("_exp_pass", "_grad_pass")]
    assert len(lines) == 8 and len(passes) == 6
    assert all(line[1] == "1" for line in lines), f"narrow loads: {lines}"
    assert sum(line[2] == "1" for line in passes) == 4, f"narrow stores: {lines}"  # two passes only read
    assert all(line[3] == "0" for line in lines), f"local memory: {lines}"
