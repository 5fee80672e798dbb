"""The registry, runs and jobs as JSON, for pages and programs. Loads no torch."""
