"""Inference of an image together with a few parameters of what observed it."""
