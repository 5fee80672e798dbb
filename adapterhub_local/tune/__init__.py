"""A merge searched: the weights, methods and densities that do best on held-out data of several tasks."""
