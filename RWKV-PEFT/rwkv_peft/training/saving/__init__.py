"""The files that a run leaves; a run that ended goes on from them."""
