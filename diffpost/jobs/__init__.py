"""The parts of a deconvolution job: its PSF, its target, its model and its output folder."""
