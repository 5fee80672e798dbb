"""The console: pages for people over the same registry, runs and engine that the API shows. Loads no torch."""
