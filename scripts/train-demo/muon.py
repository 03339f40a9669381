"""Muon: momentum whose matrix steps are made orthogonal, so that all directions of a weight learn at one speed.

For the hidden matrices only; embeddings and norms take AdamW. Matrices of one shape are stepped together.
"""
import torch


def orthogonal(g, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix; g [batch, rows, columns]."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """`blocks`: (parameter, row counts) where a parameter stacks several matrices, as q, k, v are one here."""

    def __init__(self, blocks, lr, momentum=0.95, weight_decay=0.01):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.blocks = [(p, sizes, torch.zeros_like(p)) for p, sizes in blocks]

    @torch.no_grad()
    def step(self, scale):
        shapes = {}
        for p, sizes, held in self.blocks:
            held.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(held, self.momentum)
            p.mul_(1 - self.lr * scale * self.weight_decay)
            for part, into in zip(update.split(sizes), p.split(sizes)):
                shapes.setdefault(tuple(part.shape), []).append((part, into))
        for (rows, columns), pairs in shapes.items():
            steps = orthogonal(torch.stack([part for part, _ in pairs]))
            size = self.lr * scale * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_([into for _, into in pairs], list(steps.unbind(0)), alpha=-size)
