"""Ten minutes on one GPU, told in phases; `python -m benchmarks.gpu --help`, and METHOD.md for the reasons.

plan.py      what is measured, in which order, and how long each figure should take
run.py       the driver: a process for each job, its limits, the budget; knows nothing of torch
worker.py    the process of one job: measures figure after figure
lines.py     one JSON line a figure, whole or not at all
tables.py    the lines as tables
"""
