"""`python -m megatron_bvpo …` is `bvpo …`, for processes that start others with their own Python."""

import sys

from megatron_bvpo.cli import bvpo

sys.exit(bvpo())
