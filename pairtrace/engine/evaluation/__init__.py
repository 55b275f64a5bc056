"""Measuring models: behaviour rates, over-refusal, helpfulness, format, preference accuracy, drift, capabilities."""
