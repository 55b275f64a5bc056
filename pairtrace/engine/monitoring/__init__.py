"""Early warning: what preference training is changing, while it trains."""
