"""Live sources and many streams at once."""
