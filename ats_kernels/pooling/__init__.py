"""Estimate the attention's expectation of the features from drawn cells."""
