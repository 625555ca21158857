"""Which pairs make an encoder better: a map of authors, rightness and arms on the embedded world."""
