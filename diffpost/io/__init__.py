"""Reading and writing: FITS images, training images, checkpoints, samples."""
