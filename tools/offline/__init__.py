"""Compile every kernel for GPUs that are not there."""
