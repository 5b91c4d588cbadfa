"""Images on disk that no memory holds: slides, rasters, image files and arrays, read a box at a time."""
