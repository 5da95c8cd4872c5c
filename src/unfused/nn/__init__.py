"""Blocks that two or more methods share: front end, encoders, EMA, heads, losses, augmentation."""
