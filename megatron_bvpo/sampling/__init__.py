"""From prompts to pairs: samples of a served model in each mode, judgements, pairs. Loads neither torch nor a host."""
