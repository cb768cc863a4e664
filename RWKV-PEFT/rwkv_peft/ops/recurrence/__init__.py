"""What the recurrences have in common. A generation's folder beside this one has what is its own: its signature and
formula (op.py), its reference, and which kernels of cpu/ and cuda/ compute it.

A backend takes contiguous, checked tensors in the order of the signature: those (B, T, H, N) of one dtype, the others
and the states float32, cu_seqlens int64. Operations are differentiable once, in all inputs and the state.
"""
