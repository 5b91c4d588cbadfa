"""What to do with a file that a reader cannot read right: through rasterio, where that can."""

import importlib
import importlib.util
import warnings
from pathlib import Path

from ats.sources.image_source import DTYPES

_CALL = "ats.open_image(path, backend='rasterio')"


def advice_for(path: Path) -> str:
    """How to have a file read: what to install if it takes that, and to convert it where nothing here reads it."""
    try:
        if importlib.util.find_spec("rasterio") is None:
            raise ModuleNotFoundError("rasterio")
        rasterio = importlib.import_module("rasterio")
    except (ModuleNotFoundError, ValueError):  # or it is being kept from being imported
        return f"read it with rasterio: pip install 'torch-ats[satellite]', then {_CALL}"
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    known = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    try:
        with rasterio.open(path) as dataset:
            readable = dataset.count > 0 and len(set(dataset.dtypes)) == 1 and dataset.dtypes[0] in known
    except Exception:  # of GDAL's, whatever it says of a file that is none of its kinds
        readable = False
    if readable:
        return f"read it with rasterio: {_CALL}"
    return f"convert it, e.g. to a TIFF of {', '.join(sorted(known))}: rasterio, which is here, cannot read it either"
