"""Predictions of models compared with measurements: contacts in structures and deep mutational scans."""
