"""Transforms of a finished model, each one function that changes the model in place."""
