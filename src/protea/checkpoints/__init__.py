"""Weights on disk: where published models are found, and one module a format."""
