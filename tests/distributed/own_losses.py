"""Losses as a user would bring them along: `--loss_type tests.distributed.own_losses:hinge`."""

from __future__ import annotations


def hinge(pairs, config):
    """SLiC's hinge once more. `pairs` has log-probs [P] of policy and reference, and counted tokens."""
    margin = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
    return (1 - config.beta * margin).relu()


def squared(logps):
    """A token loss: log-probs of a demonstration's tokens → losses of the same shape, 0 where a log-prob is 0."""
    return logps**2
