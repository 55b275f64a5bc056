"""What training does to a behaviour, to the model's usefulness, and to probes' ability to detect the behaviour."""
