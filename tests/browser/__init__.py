"""The notebooks in a real browser: `make browser`."""
