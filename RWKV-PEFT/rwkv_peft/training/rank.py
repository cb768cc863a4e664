"""A further process of a node (processes.py): it trains as train.py does, and ends with the process that started it."""

from ..cli.errors import exit_on_user_error
from .ranks.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    from .run import main

    exit_on_user_error(main)
