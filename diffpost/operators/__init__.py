"""The operators behind :mod:`diffpost.operator`, where they are imported from."""
