"""Figures: what attention is on, curves, and overlays."""
