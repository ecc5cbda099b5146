"""k-means with the kernels alone: no module and no modalities, only tensors.

`nearest_code` assigns vectors to centres, and `code_statistics` counts and sums the vectors of each
centre. Together they are one step of Lloyd's algorithm, on a CPU or a GPU. The `[N, K]` matrix of
distances is never stored.
"""

import torch

from mmvq_kernels import code_statistics, nearest_code

torch.manual_seed(0)
N, K, D = 20_000, 20, 8
x = 3 * torch.randn(K, D)[torch.randint(K, (N,))] + torch.randn(N, D)  # K clusters
start = x[torch.randperm(N)[:K]]

centres, inertia = start, []
while len(inertia) < 2 or inertia[-1] < inertia[-2]:
    nearest = nearest_code(x, centres)  # int64 [N], the lowest index on ties
    inertia.append((x - centres[nearest]).square().sum(dtype=torch.float64).item())
    counts, sums = code_statistics(x, nearest, K)  # [K], [K, D]
    empty = (counts == 0)[:, None]
    centres = torch.where(empty, centres, sums / counts[:, None])  # empty: keep the centre

print(f"{len(inertia)} steps, inertia {inertia[0]:.0f} -> {inertia[-1]:.0f}")
print(f"clusters of {int(counts.min())} to {int(counts.max())} points")
