"""Weights that others have published, imported into our trees."""
