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
            signature = f"*fp32 *fp32 *i64 *fp32 *{dtype} i32 i32 i32 i32"
            aligned = "logits_ptr exp_ptr logits_stride exp_stride"
            form = f"{dtype}, {'writes' if write else 'reads only'}"
            found.append(build(k._exp_pass, form, signature, aligned, k.PASS_BLOCK, k.PASS_WARPS, WRITE=write))
        signature = f"*fp32 *fp32 *i64 *fp32 *fp32 *{dtype} i32 i32 i32"
        aligned = "logits_ptr grad_ptr columns logits_stride grad_stride"
        found.append(build(k._grad_pass, f"{dtype}, writes", signature, aligned, k.PASS_BLOCK, k.PASS_WARPS))
        signature = f"*{dtype} *{dtype} *i64 *fp32 i32 i32 i32 i32"
        aligned = "x_ptr weight_ptr hidden x_stride weight_stride"
        found.append(build(k._target_logit, f"{dtype}, reads only", signature, aligned, 1024, 4))
    return found


def build(function, form: str, signature: str, aligned: str, block: int, warps: int, **constants) -> dict:
    """Compile one form; what ptxas says of it and what its PTX holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    constants["BLOCK"] = block
    types = dict(zip(names, signature.split(), strict=False)) | dict.fromkeys(constants, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned.split()}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
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
