"""What happens to gradients: the process groups they are reduced over, and how two streams are mixed."""
