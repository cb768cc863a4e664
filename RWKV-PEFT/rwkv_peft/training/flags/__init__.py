"""The command line of train.py: its flags, their synonyms and rules, and the request that they make."""
