"""From encoded images to adapters: the loop and all that keeps it safe."""
