"""Numerics on plain arrays and tensors: no models, no files, no configuration."""
