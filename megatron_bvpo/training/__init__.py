"""A run in a rank: arguments, pipeline, the step with its passes, probes and references."""
