"""How alike adapters are: which matrices are compared, the measures, a page to look at."""
