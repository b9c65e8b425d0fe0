"""Bunny World: a small cartoon universe with known truth, to pretrain on and to measure against."""
