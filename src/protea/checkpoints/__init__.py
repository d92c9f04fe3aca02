"""Weights on disk: where published models are found, and one module for each format.

Readers raise ``CheckpointError`` where a file is missing, unreadable, damaged, hostile, incomplete, or contradicts
another one. Writers hold one tensor in memory at a time, and raise ``OSError`` where a file cannot be written.
"""
