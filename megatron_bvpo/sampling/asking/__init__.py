"""Prompts to samples: servers, modes, the journal, budgets."""
