"""What a model says of sequences: perplexity, effects of variants, contacts."""
