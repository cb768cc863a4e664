"""Make files from base and adapter that other runtimes load, and check that those compute what we do."""
