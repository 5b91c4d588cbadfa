"""Small synthetic data sets in the layouts of the real ones."""
