"""Runs on disk: their folders, checkpoints, metrics and certificates."""
