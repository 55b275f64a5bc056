"""Linear probes: trained on mean response activations, used as directions, as monitors and as training signals."""
