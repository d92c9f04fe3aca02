"""Scores that a model gives to sequences: perplexity and effects of variants."""
