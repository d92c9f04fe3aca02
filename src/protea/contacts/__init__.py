"""Which residues of a protein touch: predicted, fitted to structures, measured against them."""
