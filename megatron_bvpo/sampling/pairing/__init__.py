"""Judged samples to rows: which two answers make a pair, and what to fear of the pairs."""
