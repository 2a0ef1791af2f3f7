"""Chains of jobs that exist already: rounds, sweeps, and what their stages need."""
