"""Tell a broken connection between ranks from other errors: the rank that ended it is the one to report."""

import torch.distributed as dist


def is_of_connection(error: BaseException) -> bool:
    """Tell whether an error is that of a collective whose connection to another rank broke."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
