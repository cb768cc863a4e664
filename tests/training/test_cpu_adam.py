"""The lock of a build that was killed is removed, that of one that goes on is not."""

from rwkv_peft.training.cpu_adam import remove_stale_lock


def test_a_lock_counts_while_a_process_has_it_open(tmp_path):
    lock = tmp_path / "lock"
    with open(lock, "x"):
        remove_stale_lock(lock)
        assert lock.exists()
    remove_stale_lock(lock)
    assert not lock.exists()


def test_no_lock_is_no_matter(tmp_path):
    remove_stale_lock(tmp_path / "lock")
    assert not list(tmp_path.iterdir())
