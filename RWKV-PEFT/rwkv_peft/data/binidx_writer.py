"""Write token files, whole or not at all; binidx.py has the format."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import NotNow
from ..files.atomic import temporary_beside
from ..files.lock import Busy, hold
from .prefix import binidx_prefix
from .token_files import TokenFiles, name_set, synced


class BinidxWriter(TokenFiles):
    """Writes PREFIX.bin, PREFIX.idx, PREFIX.mask if mask=True, and PREFIX.weights; a context manager.

    The files appear, whole, when the block ends without an exception, the index last. Until then they are hidden
    temporary files in the same folder, which are removed if the block fails, or by the next writer there if the process
    was killed. A mask of ones is not kept, nor are weights of 1, because they say nothing. Raises NotNow if another
    process is writing the same data set, UserError if the files cannot be written.
    """

    files: dict[str, BinaryIO]

    def __init__(self, path: str | Path, vocab_size: int = 65536, mask: bool = False) -> None:
        super().__init__(vocab_size, mask)
        self.prefix = binidx_prefix(path)

    def __enter__(self) -> "BinidxWriter":
        endings = (".bin", ".weights", *((".mask",) if self.with_mask else ()), ".idx")
        with ExitStack() as stack:
            # the first temporary file makes the folder
            names = {end: stack.enter_context(temporary_beside(Path(self.prefix + end))) for end in endings}
            stack.enter_context(alone(self.prefix))
            self.files = {end: stack.enter_context(open(name, "wb")) for end, name in names.items()}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, error, trace)
        with self._stack:  # turns failures to write into UserErrors
            self.write_index(self.files[".idx"], self.files[".weights"])
            for file in self.files.values():
                synced(file)
            name_set({end: file.name for end, file in self.files.items()}, self.prefix, self.says)
        return False


@contextmanager
def alone(prefix: str) -> Iterator[None]:
    """Hold the lock of a data set while it is written. Raises NotNow if another process does."""
    try:
        with hold(Path(prefix).with_name(f".{Path(prefix).name}.lock")):
            yield
    except Busy as error:
        raise NotNow(f"{prefix}: another process is writing it ({error}); wait, or give another name") from None
