"""The first minutes on GPUs: the real Transformer Engine and NCCL against the stand-ins' numbers.

`launch/first_gpu.sh` and docs/first-gpu-run.md. In the order of the data:

1. `plan.py` — which tiny runs ("cells"), and which of them are compared with which
2. `run.py` — the driver: groups of cells in processes of their own, with limits; goes on where it was stopped
3. `worker.py`, `recorder.py` — a group's ranks, and what is written down of each step
4. `judge.py` — a comparison's number and its bound; `table.py` — all of them, with what to do

The driver loads no torch, so that nothing a run does to a device can end it.
"""
