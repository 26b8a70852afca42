"""Scores of images that may have several labels."""
