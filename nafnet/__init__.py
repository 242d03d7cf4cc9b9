"""NAFNet."""
