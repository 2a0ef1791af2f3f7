"""The Triton kernels compiled for sm_90 without a GPU: registers, spills (stack, local memory), shared memory, widths.

    python benchmarks/hopper_compile.py                # the installed Triton, as a table
    python benchmarks/hopper_compile.py --json         # one JSON object a kernel
    python benchmarks/hopper_compile.py --triton DIR   # another Triton: a folder that its wheel was unpacked to

Every kernel in every form that the log-probs launch. Offline, so it says nothing of time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def kernels() -> list[dict]:
    from megatron_bvpo.kernels import triton_logprob as k

    found = []
    for dtype in ("bf16", "fp32"):
        for write in (True, False):
            # `columns` is not aligned: an odd vocabulary.
            signature = f"*fp32 *fp32 *i64 *fp32 *{dtype} *fp32 fp32 i32 i32 i32 i32"
            aligned = "logits_ptr exp_ptr logits_stride exp_stride"
            form = f"{dtype}, {'writes' if write else 'reads only'}"
            found.append(
                build(
                    k._exp_pass, form, signature, aligned, k.PASS_WARPS, BLOCK=k.PASS_BLOCK, WRITE=write, MOMENT=False
                )
            )
        signature = f"*fp32 *fp32 *i64 *fp32 *fp32 *{dtype} fp32 i32 i32 i32"
        aligned = "logits_ptr grad_ptr columns logits_stride grad_stride"
        found.append(build(k._grad_pass, f"{dtype}, writes", signature, aligned, k.PASS_WARPS, BLOCK=k.PASS_BLOCK))
        signature = f"*fp32 *{dtype} *i64 *fp32 *fp32 *i64 *{dtype} i32 i32 i32 i32 i32"
        aligned = "products_ptr weight_ptr out_ptr hidden products_stride weight_stride out_stride"
        found.append(build(k._finish_gradient, f"{dtype}, writes", signature, aligned, 4, BLOCK=1024))
        signature = f"*{dtype} *{dtype} *i64 *fp32 i32 i32 i32 i32"
        aligned = "x_ptr weight_ptr hidden x_stride weight_stride"
        found.append(build(k._target_logit, f"{dtype}, reads only", signature, aligned, 4, BLOCK=1024))
    return found + fused_kernels()


def fused_kernels() -> list[dict]:
    from megatron_bvpo.kernels import fused_logprob as f

    depth = f.TILE_BYTES // 2
    sizes = dict(TOKENS=f.TILE_TOKENS, ROWS=f.TILE_ROWS, DEPTH=depth, GROUP=f.GROUP, STAGES=f.STAGES, WIDEN=False)
    blocks = [(f.TILE_TOKENS, depth), (f.TILE_ROWS, depth), (f.TILE_TOKENS, f.TILE_ROWS // 2)]
    descriptors = [f"tensordesc<bf16[{height},{width}]>" for height, width in blocks]
    found = []
    for write, moment in ((True, False), (False, False), (True, True), (False, True)):
        # Without products the descriptor of x stands in the place of the one that is not used.
        rest = "*fp32 *i64 *fp32 *fp32 fp32 i32 i32 i32 i32"
        signature = " ".join([*descriptors[:2], descriptors[2 if write else 0], rest])
        form = f"bf16, {'writes' if write else 'reads only'}{', entropy' if moment else ''}"
        options = dict(stages=f.STAGES, WRITE=write, MOMENT=moment, **sizes)
        aligned = "anchor_ptr local_ptr sums_ptr moments_ptr hidden"
        found.append(build(f._exp_product, form, signature, aligned, f.WARPS, **options))
    signature, sizes = "*fp32 *fp32 i32 i32", dict(TILES=f.SUM_TILES, TOKENS=f.SUM_TOKENS)
    found.append(build(f._add_partial_sums, "fp32, reads only", signature, "sums_ptr s_ptr", 4, **sizes))
    return found


def build(function, form: str, signature: str, aligned: str, warps: int, *, stages: int = 3, **constants) -> dict:
    """Compile one form; what ptxas says of it and what its PTX holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    types = dict(zip(names, signature.split(), strict=False)) | dict.fromkeys(constants, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned.split()}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    return {
        "triton": triton.__version__,
        "kernel": function.__name__,
        "form": form,
        **resources(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin"),
        "shared_bytes": kernel.metadata.shared,
        "warps": warps,
        "wide_loads": "ld.global.v4.b32" in ptx,
        "wide_stores": "st.global.v4.b32" in ptx,
        "matrix_instructions": sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx))),
        "tma_loads": "cp.async.bulk.tensor.2d.shared" in ptx,
        "tma_stores": "cp.async.bulk.tensor.2d.global" in ptx,
    }


def resources(cubin: bytes, tools: Path) -> dict[str, int]:
    """What the machine code takes a thread; spilled registers would be on the stack."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [tools / "cuobjdump", "--dump-resource-usage", file]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = lambda name: int(re.search(rf"\b{name}:(\d+)", said)[1])  # noqa: E731
    return {"registers": number("REG"), "stack_bytes": number("STACK"), "local_bytes": number("LOCAL")}


def table(found: list[dict]) -> str:
    columns = ("kernel", "form", "warps", "registers", "stack_bytes", "local_bytes", "shared_bytes")
    lines = [f"triton {found[0]['triton']}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row[c]) for c in columns) + " |" for row in found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", type=Path, help="folder of another Triton, in front of the installed one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    if options.triton:
        sys.path[:0] = [str(options.triton)]
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        found = kernels()
    print("\n".join(map(json.dumps, found)) if options.json else table(found))


if __name__ == "__main__":
    main()
