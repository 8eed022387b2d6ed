"""DCNv3: operator, paths and module."""
