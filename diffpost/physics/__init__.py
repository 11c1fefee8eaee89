"""Operators of real instruments and skies: grids, lenses, point spread functions, visibilities."""
