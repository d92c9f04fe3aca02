"""One HTTP service for models and adapters, which packs the sequences of all requests together."""
