"""Photographs of natural size."""
