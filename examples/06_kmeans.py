"""k-means of the kernels alone: no module, no modality, flat tensors.

`nearest_code` assigns, `code_statistics` counts and sums: together they are a step of Lloyd's
algorithm, on a CPU or a GPU, in memory that does not grow with N times K.
"""

import torch

from mmvq_kernels import code_statistics, nearest_code

torch.manual_seed(0)
N, K, D = 20_000, 20, 8
x = 3 * torch.randn(K, D)[torch.randint(K, (N,))] + torch.randn(N, D)  # K clouds
start = x[torch.randperm(N)[:K]]

centres, inertia = start, []
while len(inertia) < 2 or inertia[-1] < inertia[-2]:
    nearest = nearest_code(x, centres)  # int64 [N], the lowest index on ties
    inertia.append((x - centres[nearest]).square().sum(dtype=torch.float64).item())
    counts, sums = code_statistics(x, nearest, K)  # [K], [K, D]
    empty = (counts == 0)[:, None]
    centres = torch.where(empty, centres, sums / counts[:, None])  # an empty one stays in place

print(f"{len(inertia)} steps, inertia {inertia[0]:.0f} -> {inertia[-1]:.0f}")
print(f"clouds of {int(counts.min())} to {int(counts.max())} points")
