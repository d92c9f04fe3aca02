"""From records to embeddings: the engine, and the stores it writes to."""
