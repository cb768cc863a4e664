"""The files that a run leaves, and from which one that ended goes on."""
