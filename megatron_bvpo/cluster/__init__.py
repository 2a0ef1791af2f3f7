"""Around a run on many nodes: what is checked before it starts, and who watches over the nodes while it runs."""
