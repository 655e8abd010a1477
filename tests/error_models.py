"""Small models whose source lines appear in golden errors: a line that moves here changes tests/golden/error_*.txt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Three heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.o_proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, 3, 4).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, s, 12))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(), Mlp(), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm(x))


class Sorted(nn.Module):
    """Sorts along the axis that its Linear makes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.up(x).sort(dim=-1)
        return self.down(y)


class Unruled(nn.Module):
    """Meets an op that no rule describes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.linalg.pinv(self.up(x))
        return self.down(y.transpose(1, 2))


class Regrouped(nn.Module):
    """Regroups 24 positions against a sequence: no factor of the hidden axis stays together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).transpose(1, 2).reshape(x.shape[0], -1, 24)
        return self.down(y)


class Normed(nn.Module):
    """LayerNorm and softmax over the axis that its Linear makes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(x))
        return self.down(y.softmax(-1))


class Square(nn.Module):
    """One weight, both of whose dims are the hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y + self.mix(y))


class Grouped(nn.Module):
    """``kv`` key heads, each for ``repeat`` query heads."""

    def __init__(self, kv: int, repeat: int) -> None:
        super().__init__()
        self.kv, self.repeat = kv, repeat
        self.q_proj, self.o_proj = nn.Linear(12, kv * repeat * 4), nn.Linear(kv * repeat * 4, 12)
        self.k_proj, self.v_proj = nn.Linear(12, kv * 4), nn.Linear(12, kv * 4)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, self.kv * self.repeat, 4).transpose(1, 2)
        k, v = (p(x).view(b, s, self.kv, 4).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1))


class TwoGroupings(nn.Module):
    """Over 6 ranks the one asks for 2 * 3, the other for 3 * 2."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Grouped(2, 3), Grouped(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Convolved(nn.Module):
    """Twelve channels, each of them convolved by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Conv1d(12, 12, 3, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x.transpose(1, 2))
