"""The low-resolution view of an image: the mean over each pixel's area."""
