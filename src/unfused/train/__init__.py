"""One training engine on transformers' Trainer."""
