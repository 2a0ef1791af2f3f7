"""From preference rows to batches that hold a trace pair and an empty-trace pair."""
