"""From base and adapter to files that other runtimes load, and the proof that they do."""
