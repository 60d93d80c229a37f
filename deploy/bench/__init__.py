"""``mara bench``: each figure is a ratio to a peer, both measured in turn in one run."""
