"""How Bunny World's own models are made."""
