"""Cut patches out of full-resolution images."""
