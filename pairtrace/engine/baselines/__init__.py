"""Other ways to rank the pairs of a store, each of which writes an ordinary scores file and a cost record."""
