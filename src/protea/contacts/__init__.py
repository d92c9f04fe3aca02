"""Contacts between residues: predict them, fit contact heads to structures, measure the precision."""
