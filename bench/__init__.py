"""Benchmarks: times, scratch memory and targets; `make bench` runs them all."""
