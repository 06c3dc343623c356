"""Public checkpoints into our trees."""
