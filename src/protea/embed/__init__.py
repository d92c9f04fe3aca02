"""From records to embeddings: the run over files, and the stores it writes to."""
