"""Ways to store weights in fewer bits, and choosing among them; the libraries do the rounding."""
