"""A reasoning model small enough to enumerate, and what the alpha estimator does on it."""
