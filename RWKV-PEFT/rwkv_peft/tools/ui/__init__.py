"""A page in the browser where people look at their data, train, watch runs, chat and release.

It starts the commands that a terminal starts and reads the files that they write, so that the runs of both are shown by
both.
"""
