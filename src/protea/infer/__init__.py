"""Computing with a finished model: loading it, running jobs in packs, windows over long sequences, memory."""
