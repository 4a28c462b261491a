"""PyTorch's CPU attention and annulus on the same tensors, in turn.

    python3 -m venv venv && venv/bin/pip install torch
    taskset -c 0 venv/bin/python tests/performance/torch/torch_cpu_attention.py \
        build/libannulus_attention_c.so

Each row says what part of the processor's peak both reach (loops in registers, in turn with them),
and hence how many times PyTorch's speed no kernel can exceed. Vectors only: the tile unit's peak is
another.

Rows can be run one at a time (--dtype, --head-dim, --mask, --direction), and on a machine with
other work by the time that the processor spent on them (--cpu-time).
"""
import argparse
import ctypes
import itertools
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS = 8
THREADS = 1
PEAK_ROUNDS = 20_000_000
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


class Annulus:
    """Tensors [1, seq, heads, head_dim], as PyTorch sees them after a transpose."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.annulus_peak_rounds.restype = ctypes.c_double

    def peak_rounds(self, rounds, dtype):
        return self.library.annulus_peak_rounds(ctypes.c_int64(rounds), int(dtype == torch.bfloat16))

    def forward(self, q, k, v, o, lse, causal):
        sizes = [ctypes.c_int64(n) for n in q.shape[1:]]
        args = [pointer(t) for t in (q, k, v, o, lse)]
        assert self.library.annulus_forward(*args, *sizes, int(causal), int(q.dtype == torch.bfloat16)) == 0

    def backward(self, q, k, v, o, grad_o, lse, delta, grads, causal):
        sizes = [ctypes.c_int64(n) for n in q.shape[1:]]
        args = [pointer(t) for t in (q, k, v, o, grad_o, lse, delta, *grads)]
        assert self.library.annulus_backward(*args, *sizes, int(causal), int(q.dtype == torch.bfloat16)) == 0


class Clock:
    """Median seconds of pieces of work in turn."""

    def __init__(self, repeats, cpu_time):
        self.repeats = repeats
        self.now = time.process_time if cpu_time else time.perf_counter

    def seconds(self, work):
        start = self.now()
        work()
        return self.now() - start

    def in_turn(self, *works):
        for work in works:
            work()
        rounds = [[self.seconds(work) for work in works] for _ in range(self.repeats)]
        return [statistics.median(times) for times in zip(*rounds)]


def compare(annulus, clock, dtype, seq, head_dim, causal, directions):
    shape = (1, seq, HEADS, head_dim)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    grad_o = torch.randn(shape).to(dtype)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    o = torch.empty(shape, dtype=dtype)
    lse = torch.empty(1, HEADS, seq)
    delta = torch.empty(1, HEADS, seq)
    grads = [torch.zeros(shape) for _ in range(3)]

    def torch_forward():
        with torch.no_grad():
            return scaled_dot_product_attention(*heads_first, is_causal=causal)

    def annulus_forward():
        annulus.forward(q, k, v, o, lse, causal)

    def peak():
        annulus.peak_rounds(PEAK_ROUNDS, dtype)

    annulus_forward()
    difference = (torch_forward().transpose(1, 2) - o).abs().max().item()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), difference
    if "forward" in directions:
        yield "forward", *clock.in_turn(torch_forward, annulus_forward, peak)
    if "backward" not in directions:
        return

    result = scaled_dot_product_attention(*heads_first, is_causal=causal)

    def torch_backward():
        return torch.autograd.grad(result, (q, k, v), grad_o.transpose(1, 2), retain_graph=True)

    def annulus_backward():
        annulus.backward(q, k, v, o, grad_o, lse, delta, grads, causal)

    annulus_backward()
    for mine, torchs in zip(grads, torch_backward()):
        difference = (mine - torchs).abs().max().item()
        assert difference < (1e-3 if dtype == torch.float32 else 0.2), difference
    yield "backward", *clock.in_turn(torch_backward, annulus_backward, peak)


def operations(seq, head_dim, causal, direction):
    """Of the kept scores; the backward pass has five products to the forward's two."""
    kept = seq * (seq + 1) / 2 if causal else seq * seq
    return (4 if direction == "forward" else 10) * kept * head_dim * HEADS


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--mask", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument("--direction", nargs="+", choices=["forward", "backward"],
                        default=["forward", "backward"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true")
    return parser.parse_args()


def main():
    given = arguments()
    torch.set_num_threads(THREADS)
    annulus = Annulus(given.library)
    clock = Clock(given.repeats, given.cpu_time)
    print(f"torch {torch.__version__}, {THREADS} thread, B=1 H={HEADS}")
    for dtype, head_dim, mask in itertools.product(given.dtype, given.head_dim, given.mask):
        rows = compare(annulus, clock, DTYPES[dtype], given.seq, head_dim, mask == "causal",
                       given.direction)
        for direction, theirs, ours, peak in rows:
            least = operations(given.seq, head_dim, mask == "causal", direction) * peak
            least /= PEAK_ROUNDS * annulus.peak_rounds(1, DTYPES[dtype])
            print(f"{dtype} S={given.seq} D={head_dim} {mask:6} {direction:8} "
                  f"torch {theirs * 1e3:7.1f} ms ({least / theirs:.2f} of the peak), "
                  f"annulus {ours * 1e3:7.1f} ms ({least / ours:.2f}): {theirs / ours:.2f}x, "
                  f"at most {theirs / least:.2f}x", flush=True)


if __name__ == "__main__":
    main()
