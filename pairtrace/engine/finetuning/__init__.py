"""Fine-tuning against probes, its controls, and what it does to detectability (arXiv 2510.21531)."""
