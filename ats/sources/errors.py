"""The error of image files."""


class ImageFileError(ValueError):
    """An image file that cannot be read, or not without losing something; the message names it."""
