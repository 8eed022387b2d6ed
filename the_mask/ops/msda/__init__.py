"""Multi-scale deformable attention: operator, paths and module."""
