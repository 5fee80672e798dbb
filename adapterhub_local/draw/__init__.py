"""Drawings: curves and bars as SVG or PNG, from numbers and escaped text alone."""
