"""What happens to gradients: the process groups they are reduced over, and how the streams' are weighed and mixed."""
