"""From prompts to pairs: `asking`, `judging`, `pairing`, and the folder that they share (`samples.py`).

Loads neither torch nor a host.
"""
