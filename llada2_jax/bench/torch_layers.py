"""A process that trains the layers of jax_layers.py in PyTorch, for `bench layers`.

    python torch_layers.py JOB.json RESULT.json

It imports nothing of the project, so that the interpreter may be another one, with PyTorch. Modules
are named and weights are shaped as in llada2_jax.model; layers are not stacked but in lists.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    create_block_mask,
    create_mask,
    flex_attention,
)
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]


def parameter(cfg, *shape):
    """A normal of the project's variance, in the dtype of parameters, on the default device."""
    dtype = getattr(torch, cfg.param_dtype)
    return nn.Parameter(torch.empty(shape, dtype=dtype).normal_(0, cfg.initializer_range))


class RMSNorm(nn.Module):
    def __init__(self, size, cfg):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, dtype=getattr(torch, cfg.param_dtype)))
        self.eps = cfg.rms_norm_eps

    def forward(self, x):
        scale = self.scale.float()
        return F.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width, cfg):
        super().__init__()
        self.gate_up = parameter(cfg, cfg.hidden_size, 2, width)
        self.down = parameter(cfg, width, cfg.hidden_size)

    def forward(self, x):
        gate, up = (x @ self.gate_up.flatten(1)).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down


class Attention(nn.Module):
    """Grouped queries, norms of queries and keys, partial rotary embedding."""

    def __init__(self, cfg):
        super().__init__()
        heads, kv, size = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.qkv = parameter(cfg, cfg.hidden_size, heads + 2 * kv, size)
        self.out = parameter(cfg, heads, size, cfg.hidden_size)
        self.q_norm, self.k_norm = RMSNorm(size, cfg), RMSNorm(size, cfg)
        self.heads = [heads, kv, kv]

    def forward(self, x, rotary, mask):
        qkv = (x @ self.qkv.flatten(1)).unflatten(-1, self.qkv.shape[1:])
        q, k, v = qkv.split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if isinstance(mask, torch.Tensor):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2) @ self.out.flatten(0, 1)


def rotary_tables(cfg, positions):
    """cos and sin [positions, 1, rotary_dim / 2], in fp32."""
    size = int(cfg.head_dim * cfg.partial_rotary_factor)
    frequencies = cfg.rope_theta ** -(torch.arange(0, size, 2).float() / size)
    angles = positions[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """The first channels of each head by halves; the others pass."""
    half = cos.shape[-1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1).to(x.dtype)


def attention_mask(length, block_size, device):
    """Who sees whom in [noisy ; clean] rows of one document: every earlier clean block, and the own
    block of the own half. FlexAttention's on a GPU, dense elsewhere."""

    def rule(batch, head, query, key):
        query_block, key_block = (i % length // block_size for i in (query, key))
        own = (query_block == key_block) & ((query >= length) == (key >= length))
        return own | ((key >= length) & (key_block < query_block))

    create = create_block_mask if device.type == "cuda" else create_mask
    return create(rule, None, None, 2 * length, 2 * length, device=device)


class Router(nn.Module):
    """Group-limited choice by sigmoid score + bias, weights by the score alone; in fp32."""

    def __init__(self, cfg):
        super().__init__()
        self.kernel = parameter(cfg, cfg.hidden_size, cfg.num_experts)
        self.register_buffer("expert_bias", torch.zeros(cfg.num_experts))
        self.cfg = cfg

    def forward(self, x):
        cfg = self.cfg
        scores = (x.float() @ self.kernel.float()).sigmoid()
        grouped = (scores.detach() + self.expert_bias).unflatten(-1, (cfg.n_group, -1))
        best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(cfg.topk_group).indices
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best_groups, False)
        limited = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(1)
        experts = limited.topk(cfg.experts_per_token).indices
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * cfg.routed_scaling_factor


class ToSlots(torch.autograd.Function):
    """Rows of tokens [tokens, D] in the order of their experts [tokens·k, D]. Its gradient is a
    gather too, not a scatter."""

    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(order, place)
        return x[order // (len(order) // len(x))]

    @staticmethod
    def backward(ctx, grad):
        order, place = ctx.saved_tensors
        return summed(grad, place), None, None


class FromSlots(torch.autograd.Function):
    """The transpose of ToSlots."""

    @staticmethod
    def forward(ctx, slots, order, place):
        ctx.save_for_backward(order, place)
        return summed(slots, place)

    @staticmethod
    def backward(ctx, grad):
        order, place = ctx.saved_tensors
        return grad[order // place.shape[1]], None, None


def summed(slots, place):
    """Σ in fp32 over a token's slots, place [tokens, k]."""
    return slots[place].sum(1, dtype=torch.float32).to(slots.dtype)


class Experts(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        count, size, width = cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up = parameter(cfg, count, size, 2, width)
        self.down = parameter(cfg, count, width, size)

    def forward(self, x, experts, weights):
        sorted_experts, order = experts.flatten().sort(stable=True)
        place = order.argsort().view_as(experts)
        ids = torch.arange(len(self.down), device=x.device)
        ends = torch.searchsorted(sorted_experts, ids, right=True).int()
        rows = ToSlots.apply(x, order, place)
        gate, up = F.grouped_mm(rows, self.gate_up.flatten(2), offs=ends).chunk(2, -1)
        hidden = (F.silu(gate) * up).float() * weights.flatten()[order][:, None]
        return FromSlots.apply(F.grouped_mm(hidden.to(x.dtype), self.down, offs=ends), order, place)


class MoE(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.router, self.experts = Router(cfg), Experts(cfg)
        self.shared = FeedForward(cfg.moe_intermediate_size * cfg.num_shared_experts, cfg)

    def forward(self, x):
        flat = x.flatten(0, 1)
        return self.experts(flat, *self.router(flat)).view_as(x) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, cfg, moe):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(cfg.hidden_size, cfg), Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg)
        self.mlp = MoE(cfg) if moe else FeedForward(cfg.intermediate_size, cfg)

    def forward(self, x, rotary, mask):
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """All layers and the final norm."""

    def __init__(self, cfg):
        super().__init__()
        dense = min(cfg.first_k_dense_replace, cfg.num_layers)
        self.dense_layers = nn.ModuleList(Layer(cfg, False) for _ in range(dense))
        self.moe_layers = nn.ModuleList(Layer(cfg, True) for _ in range(cfg.num_layers - dense))
        self.final_norm = RMSNorm(cfg.hidden_size, cfg)
        if cfg.remat not in ("full", "none"):
            raise NotImplementedError(f"remat {cfg.remat!r} is not written here: full or none")
        self.recompute = cfg.remat == "full"

    @property
    def layers(self):
        return [*self.dense_layers, *self.moe_layers]

    def forward(self, x, rotary, mask):
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask)
        return self.final_norm(x)


class AdamW:
    """Clipped by the global norm; moments in fp32, updates of bf16 parameters rounded at random. No
    decay of the norms' scales."""

    def __init__(self, stack, options):
        self.options, self.count = SimpleNamespace(**options), 0
        self.parts = [
            (p, *(torch.zeros_like(p, dtype=torch.float32) for _ in "mv"), p.ndim > 1)
            for p in stack.parameters()
        ]
        on_gpu = next(stack.parameters()).is_cuda
        self.update = torch.compile(self._update, dynamic=True) if on_gpu else self._update

    @torch.no_grad()
    def step(self):
        opt, self.count = self.options, self.count + 1
        grads = [p.grad for p, *_ in self.parts]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
        clip = (opt.clip_norm / norm).clamp(max=1.0)
        corrections = norm.new_tensor([1 - b**self.count for b in (opt.b1, opt.b2)])
        for p, m, v, decays in self.parts:
            flat, grad, m, v = (x.view(-1) for x in (p.detach(), p.grad, m, v))
            decay = opt.weight_decay if decays else 0.0
            self.update(flat, grad, m, v, clip, corrections, decay)
            p.grad = None

    def _update(self, p, grad, m, v, clip, corrections, decay):
        opt, grad = self.options, grad.float() * clip
        m.lerp_(grad, 1 - opt.b1)
        v.lerp_(grad * grad, 1 - opt.b2)
        step = m / corrections[0] / ((v / corrections[1]).sqrt() + opt.eps)
        new = p.float() - opt.learning_rate * (step + decay * p.float())
        p.copy_(stochastic_bfloat16(new) if p.dtype == torch.bfloat16 else new)


def stochastic_bfloat16(x):
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 0, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class Training:
    """The stack on the job's device, and what a step needs."""

    def __init__(self, job):
        self.cfg = SimpleNamespace(**job["model"])
        self.device = torch.device("cuda" if job["platform"] == "gpu" else "cpu")
        with self.device:
            self.stack = Stack(self.cfg)
            self.rotary = rotary_tables(self.cfg, torch.arange(job["length"]).repeat(2))
        self.mask = attention_mask(job["length"], job["block_size"], self.device)
        self.optimizer = AdamW(self.stack, job["optimizer"])
        if self.device.type == "cuda":
            for layer in self.stack.layers:
                layer.compile()

    def gradients(self, x, target):
        """Loss and output; leaves gradients in the parameters and in x."""
        hidden = self.stack(x, self.rotary, self.mask)
        loss = F.mse_loss(hidden[:, : target.shape[1]].float(), target)
        loss.backward()
        return loss.detach(), hidden.detach()

    def losses(self, x, target):
        """Of one step after the other, on the same rows."""
        while True:
            x.grad = None
            loss, _ = self.gradients(x, target)
            self.optimizer.step()
            yield loss

    def inputs(self, x, target):
        """In their dtypes on the device; x takes a gradient."""
        dtype = getattr(torch, self.cfg.dtype)
        return x.to(self.device, dtype).requires_grad_(), target.to(self.device)


def timed(job):
    """Seconds a step, after two that are not timed; the losses of the first and the last step."""
    torch.manual_seed(job["seed"])
    training, (rows, length) = Training(job), (job["rows"], job["length"])
    size = training.cfg.hidden_size
    x, target = torch.randn(rows, 2 * length, size), torch.randn(rows, length, size)
    losses = training.losses(*training.inputs(x, target))
    first, _ = float(next(losses)), float(next(losses))  # .item() waits
    start = time.perf_counter()
    last = float([next(losses) for _ in range(job["steps"])][-1])
    synchronize()
    seconds = (time.perf_counter() - start) / job["steps"]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"seconds": seconds, "losses": [first, last], "peak_bytes": peak}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check(job):
    """Writes what comes of the weights and inputs in the file `given` to `found`, in fp32."""
    with np.load(job["given"]) as file:
        given = {name: torch.tensor(file[name]) for name in file.files}
    training = Training(job)
    for name, value in [*training.stack.named_parameters(), *training.stack.named_buffers()]:
        value.data.copy_(weight_of(name, given))
    x, target = training.inputs(given["x"], given["target"])
    _, hidden = training.gradients(x, target)
    found = {"output": hidden, "grad input": x.grad}
    grads = [(stacked_name(name), p.grad) for name, p in training.stack.named_parameters()]
    for name in {name for name, _ in grads}:
        same = [grad for other, grad in grads if other == name]
        found[f"grad {name}"] = same[0] if "_layers" not in name else torch.stack(same)
    training.optimizer = AdamW(training.stack, job["optimizer"])
    training.stack.zero_grad()
    losses = training.losses(x, target)
    found["losses"] = torch.stack([next(losses) for _ in range(job["steps"])])
    np.savez(job["found"], **{k: v.float().cpu().numpy() for k, v in found.items()})
    return {}


def stacked_name(name):
    """moe_layers.3.mlp.experts.down -> moe_layers/mlp/experts/down."""
    return "/".join(part for part in name.split(".") if not part.isdigit())


def weight_of(name, given):
    """Of the arrays in the job's file: a slice of stacked ones."""
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    stacked = given[stacked_name(name)]
    return stacked if layer is None else stacked[layer]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as jax has it
    answer = {"time": timed, "check": check}[asked["task"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(answer))
