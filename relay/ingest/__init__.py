"""From the wire into the store: the public side."""
