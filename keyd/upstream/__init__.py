"""Keys of another host: what a keyd without them, and the keyd that has them, say to each other."""
