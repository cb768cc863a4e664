"""The code that all recurrences share. A generation's folder beside this one has the rest: its signature and formula
(op.py), its reference, and its kernels in cpu/ and cuda/.

A backend takes contiguous, checked tensors in the order of the signature: those (B, T, H, N) of one dtype, the others
and the states float32, cu_seqlens int64. Operations are differentiable once, in all inputs and the state.
"""
