"""From a served model to a verdict: scores with intervals, and whether a run beats another. No torch, no host."""
