"""A model grown by layers (OpT-DeUS, arXiv 2508.08011): new layers between neighbours, which at first change nothing.

Torch and POT, and no host framework: a model is grown on one machine, from files to files.
"""
