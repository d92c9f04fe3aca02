"""Training data: from FASTA through clusters to a store on disk, and from the store to masked, packed batches."""
