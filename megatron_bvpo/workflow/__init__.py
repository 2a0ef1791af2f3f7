"""Chains of jobs that exist already: sweeps and rounds, on Snakemake. Loads no torch and no ms-swift."""
