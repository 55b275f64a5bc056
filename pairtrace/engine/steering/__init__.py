"""Steering: a direction added to, or projected out of, the residual stream while a model answers."""
