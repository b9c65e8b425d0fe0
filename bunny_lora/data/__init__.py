"""Frames, captions and pictures, and the training data made of them; no torch."""
