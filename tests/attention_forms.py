"""Masks of attention, and modules beside ours of the same state."""

import copy

import torch

import fastdl

N, H, L, S, E = 3, 2, 5, 7, 8
HIDDEN = -float("inf")


def ours(module):
    """A copy on our class, as `optimize` makes it of one module, in the same state."""
    twin = copy.deepcopy(module)
    twin.__class__ = getattr(fastdl.nn, type(module).__name__)
    return twin


def run(module, *inputs, **options):
    """Outputs, and gradients of parameters and inputs. What is one tensor stays one."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    out = module(*(leaves[id(x)] for x in inputs), **options)
    outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y) for y in outputs]
    wanted = [p for p in (*module.parameters(), *leaves.values()) if p.requires_grad]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_same(module, other, *inputs, **options):
    torch.testing.assert_close(
        run(module, *inputs, **options), run(other, *inputs, **options), rtol=1e-4, atol=1e-5
    )


def ops_of(call):
    seen = fastdl.explain(call)
    return [decision.op for decision in seen.decisions if decision.stage == "call"]


def hides(*shape, share=0.4):
    """A boolean mask that leaves the first key to everyone."""
    mask = torch.rand(shape) < share
    mask[..., 0] = False
    return mask


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(mask, HIDDEN)


def padding(batch=N, keys=S):
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[1, -3:] = mask[2, -1:] = True
    return mask


MASKS = {
    "none": dict,
    "padding": lambda: {"key_padding_mask": padding()},
    "float padding": lambda: {"key_padding_mask": torch.randn(N, S)},
    "mask": lambda: {"attn_mask": hides(L, S)},
    "float mask": lambda: {"attn_mask": torch.randn(L, S)},
    "mask of heads": lambda: {"attn_mask": hides(N * H, L, S)},
    "float mask of heads": lambda: {"attn_mask": torch.randn(N * H, L, S)},
    "both": lambda: {"attn_mask": hides(L, S), "key_padding_mask": padding()},
    "both, float": lambda: {"attn_mask": torch.randn(L, S), "key_padding_mask": torch.randn(N, S)},
    "both, of heads": lambda: {"attn_mask": hides(N * H, L, S), "key_padding_mask": padding()},
    "float padding alone": lambda: {
        "attn_mask": hides(L, S), "key_padding_mask": torch.randn(N, S)
    },
    "float mask alone": lambda: {"attn_mask": torch.randn(L, S), "key_padding_mask": padding()},
    "hint": lambda: {"attn_mask": causal(S)[:L], "is_causal": True},
    "hint, float": lambda: {"attn_mask": as_float(causal(S)[:L]), "is_causal": True},
    "hint and padding": lambda: {
        "attn_mask": causal(S)[:L], "key_padding_mask": padding(), "is_causal": True
    },
    "hint that learns, and padding": lambda: {
        "attn_mask": as_float(causal(S)[:L]).requires_grad_(),
        "key_padding_mask": as_float(padding()),
        "is_causal": True,
    },
}  # fmt: skip
