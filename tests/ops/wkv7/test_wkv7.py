"""wkv7's reference against its formulas, written out a token at a time."""

import torch

from cuda_shim.wkv7_cases import RESULTS, make_case, truth


def step_by_step(inputs, S, gy, gfinal):
    """One head's results in the order of RESULTS, by the formulas: inputs r w k v a b and gy (T, N), S and gfinal (N,
    N)."""
    r, w, k, v, a, b = inputs
    d = (-(-torch.tensor(0.5, dtype=r.dtype)).exp() * w.sigmoid()).exp()
    states, ys, T = [S], [], len(r)
    for t in range(T):
        states.append(states[t] * d[t] + torch.outer(states[t] @ a[t], b[t]) + torch.outer(v[t], k[t]))
        ys.append(states[t + 1] @ r[t])
    D, gradients = gfinal, []
    for t in reversed(range(T)):
        D = D + torch.outer(gy[t], r[t])
        removed = D @ b[t]  # gradient of S_{t-1} a_t
        gw = (D * states[t]).sum(0) * d[t] * -(-torch.tensor(0.5, dtype=r.dtype)).exp() * w[t].sigmoid()
        gw = gw * (-w[t]).sigmoid()
        written = D.T @ (states[t] @ a[t])
        gradients.append((states[t + 1].T @ gy[t], gw, D.T @ v[t], D @ k[t], states[t].T @ removed, written))
        D = D * d[t] + torch.outer(removed, a[t])
    return [torch.stack(ys), states[T], *(torch.stack(x[::-1]) for x in zip(*gradients)), D]


def test_the_reference_is_the_formula():
    case = make_case((1, 7, 1, 8), torch.float64)
    rows, states = [x[0, :, 0] for x in case.inputs], [x[0, 0].double() for x in (case.state, case.gfinal)]
    expected = step_by_step(rows, states[0], case.gy[0, :, 0], states[1])
    for name, one, two in zip(RESULTS, truth(case), expected, strict=True):
        torch.testing.assert_close(one.squeeze(), two, rtol=1e-12, atol=1e-12, msg=name)
