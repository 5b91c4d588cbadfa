"""Experiments: configurations, training with Lightning, evaluation, the demo and its figures."""
