"""Draw cells of an attention map."""
