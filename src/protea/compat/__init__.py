"""Other packages' interfaces, for scripts that were written for them."""
