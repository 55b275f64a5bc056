"""Whether editing the pairs at the top of a ranking is likely to work, told before anything is retrained."""
