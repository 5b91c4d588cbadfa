"""Images on disk that no memory holds: slides, rasters, image files and arrays, read a box at a time."""

from ats.sources.arrays import from_arrays
from ats.sources.image_source import ImageSource, Level
from ats.sources.masks import mask_cells, tissue_mask
from ats.sources.opening import open_image
from ats.sources.reading import Box, Clipped, clip_box, read_boxes
from ats.sources.views import read_view, view_size

__all__ = [
    "Box",
    "Clipped",
    "ImageSource",
    "Level",
    "clip_box",
    "from_arrays",
    "mask_cells",
    "open_image",
    "read_boxes",
    "read_view",
    "tissue_mask",
    "view_size",
]
