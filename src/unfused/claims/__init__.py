"""Runnable experiments that re-test what each paper promises, and their recorded results."""
