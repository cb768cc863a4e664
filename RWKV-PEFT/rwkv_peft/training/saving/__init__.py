"""What a run leaves on disk, and how one that ended goes on from it."""
