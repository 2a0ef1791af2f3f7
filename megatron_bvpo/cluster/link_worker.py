"""One rank of the preflight: computes once, then sends within its node, to the neighbour nodes, and across all.

Each phase leaves a line of JSON in the file given, so that a rank that hangs or dies shows how far it came.
Runs as `python -m megatron_bvpo.cluster.link_worker FILE SECONDS` with torchrun's variables.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

# Payload of an all-reduce in bytes: large enough for the full rate of NCCL; gloo is only to be seen working.
NCCL_BYTES = 256 * 1024**2
GLOO_BYTES = 4 * 1024**2
REPEATS = 5


def main(file: str, seconds: float) -> None:
    import torch
    import torch.distributed as dist

    notes = Path(file)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])

    def note(phase: str, **found) -> None:
        with notes.open("a") as stream:
            print(json.dumps({"phase": phase, **found}), file=stream, flush=True)

    on_gpu = torch.cuda.is_available() and os.environ.get("BVPO_REHEARSAL") != "1"
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(device)
    note("started", torch=torch.__version__, cuda=torch.version.cuda, nccl=nccl_version(torch) if on_gpu else None)
    note("computed", **(multiply(torch, device) if on_gpu else {}))

    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=0.6 * seconds))
    note("joined", backend=backend)

    def rate(group, members: int) -> float:
        """Bus bandwidth of an all-reduce in GB/s, as nccl-tests counts it: 2 (n − 1)/n × bytes / second."""
        payload = torch.ones((NCCL_BYTES if on_gpu else GLOO_BYTES) // 4, device=device)
        dist.all_reduce(payload, group=group)  # opens the connections
        payload.fill_(1)
        synchronize(torch, on_gpu)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(payload, group=group)
        synchronize(torch, on_gpu)
        took = time.perf_counter() - begin
        expected = float(members) ** REPEATS
        if not bool((payload == expected).all()):
            raise ArithmeticError(f"the sum over {members} ranks is {payload[0].item()}, not {expected}")
        return 2 * (members - 1) / members * payload.numel() * 4 * REPEATS / took / 1e9

    node, nodes = rank // per_node, world // per_node
    own = list(range(node * per_node, (node + 1) * per_node))
    if per_node > 1:
        group = dist.new_group(own, use_local_synchronization=True)
        note("within", GBs=rate(group, per_node))
    if nodes > 1 and local == 0:
        failed = None
        for pair in pairs_of(node, nodes):
            try:
                limit = timedelta(seconds=min(15, seconds / 4))
                group = dist.new_group([k * per_node for k in pair], timeout=limit, use_local_synchronization=True)
                note("pair", nodes=pair, GBs=rate(group, 2))
            except (RuntimeError, ArithmeticError) as error:  # the next pair may show which of the two it is
                failed = failed or error
        if failed:
            raise failed
    if nodes > 1:
        dist.barrier()
        note("across", GBs=rate(None, world))
    dist.barrier()
    note("done")
    dist.destroy_process_group()


def pairs_of(node: int, nodes: int) -> list[list[int]]:
    """The neighbour pairs of `node` in the order of the rounds, so that no two pairs wait for each other in a ring.

    Rounds: (0,1) (2,3) …; then (1,2) (3,4) …. A node that fails in both is the one at fault.
    """
    rounds = [(node ^ 1), node + 1 if node % 2 else node - 1]
    return [sorted((node, other)) for other in rounds if 0 <= other < nodes]


def multiply(torch, device) -> dict[str, float]:
    """A product of matrices with a known result: rate in TFLOP/s. A GPU that computes wrongly raises."""
    n = 4096
    a = torch.ones(n, n, dtype=torch.bfloat16, device=device)
    product = a @ a
    if not bool((product == n).all()):
        raise ArithmeticError("the GPU computes a wrong product of matrices")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        product = a @ a
    torch.cuda.synchronize()
    return {"TFLOPs": 20 * 2 * n**3 / (time.perf_counter() - begin) / 1e12}


def synchronize(torch, on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def nccl_version(torch) -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except BaseException as error:
        with open(sys.argv[1], "a") as stream:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            print(json.dumps({"phase": "error", "error": text}), file=stream, flush=True)
        sys.stdout.flush()
        os._exit(1)  # not through exit handlers that wait for other ranks
