"""What a run logged, as a table, a plot and a line at a time."""
