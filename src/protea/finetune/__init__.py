"""Predictors from labelled sequences: data, splits, training, baselines, and predictions that say how sure they are."""
