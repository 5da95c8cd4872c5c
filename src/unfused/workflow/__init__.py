"""The main job, `unfused.adapt`, stage by stage."""
