"""HPT's gate (arXiv 2509.04419) over rows: what a prompt's own samples say about whom to learn from. Pure.

Its authors decide with fresh rollouts. Offline it is the row's `accept_rate`, so it can be decided when the row is
read: what the gate switches off is never encoded, and N_j and T_x count what is left.
"""

from megatron_bvpo.streams import TABLE


def gate_streams(accept_rate: float, threshold: float, streams: tuple[str, ...]) -> tuple[str, ...]:
    """The streams of a row that the gate leaves on, in their order.

    Args:
        accept_rate: share of the prompt's own samples that were right, in [0, 1].
        threshold: above it the row's preferences are learnt, and its demonstration is not; else the other way round.
            0 was best for Qwen.
        streams: the streams that the row has something for.
    """
    own = accept_rate > threshold
    return tuple(stream for stream in streams if TABLE[stream].estimates == own)
