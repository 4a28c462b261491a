#!/usr/bin/env python3
"""Times the Hopper decode kernel beside its ceilings and peers on the GPU at hand.

    decode_peers.py LIBRARY [--rounds 12] [--json FILE] [--only SUBSTRING]

LIBRARY is libannulus_gpu_api.so of the build. Ceilings: a device copy, counted read and written,
and a bf16 product of 8192^3 (cuBLAS). Peers: cuDNN through PyTorch, and FlashAttention-4 (package
flash-attn-4) where it is installed. Rates count the bytes of keys and values once. Every tensor is
random, and several times as large as L2. All contenders of a row take turns, round after round;
a row gives medians, and ratios within the row.
"""
import ctypes
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from forward_peers import INT, POINTER, REAL, run_bench, take_turns

try:
    from flash_attn.cute import flash_attn_func as flash_attention_4
except ImportError:
    flash_attention_4 = None


class Decode(ctypes.Structure):
    """Mirrors AnnulusDecode."""
    _fields_ = ([(name, POINTER) for name in
                 ("q", "k", "v", "o", "lse", "accumulator", "row_max", "row_sum", "query_begin",
                  "page_table", "lengths")] +
                [(name, INT) for name in
                 ("tokens", "sequences", "pages", "page_size", "max_pages", "max_rows", "q_heads",
                  "kv_heads", "head_dim", "value_dim", "f16")] +
                [("scale", REAL), ("stream", POINTER)])


def integers(values):
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


def prepared(library, q, k, v, o, lengths, page_size, rows=1):
    """A function that launches once over caches [sequences, keys, kv_heads, dim] seen as pages in
    a random order; everything it points to stays alive with it."""
    sequences, keys, kv_heads, dim = k.shape
    max_pages = keys // page_size
    pages = sequences * max_pages
    order = torch.randperm(pages) if max_pages > 1 else torch.arange(pages)
    table, begin = integers(order), integers(torch.arange(sequences + 1) * rows)
    lengths = integers(lengths)
    value_dim = o.shape[-1]
    args = Decode(q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), None, None, None, None,
                  begin.data_ptr(), table.data_ptr(), lengths.data_ptr(), sequences * rows,
                  sequences, pages, page_size, max_pages, rows, q.shape[1], kv_heads, dim,
                  value_dim, int(q.dtype == torch.float16), dim ** -0.5,
                  torch.cuda.current_stream().cuda_stream)
    keep = (q, k, v, o, table, begin, lengths)

    def launch(args=args, keep=keep):
        if library.annulus_decode(ctypes.byref(args)) != 0:
            sys.exit("the kernel refused")
    launch.table = order.reshape(sequences, max_pages)
    return launch


def random_tensor(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


class Bench:
    def __init__(self, library, rounds, only):
        self.library, self.rounds, self.only, self.rows = library, rounds, only, []
        source = torch.randint(0, 256, (1 << 30,), device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        self.copy = lambda: target.copy_(source)
        self.copy_bytes = 2 * source.numel()
        a, b = (random_tensor(8192, 8192) for _ in range(2))
        self.gemm = lambda: a @ b

    def report(self, name, times, moved, flops=0):
        rates = {who: (self.copy_bytes if who == "copy" else moved) / time / 1e9
                 for who, time in times.items() if who != "gemm"}
        row = dict(name=name, gb_s={who: round(rate) for who, rate in rates.items()},
                   of_copy={who: round(rate / rates["copy"], 3) for who, rate in rates.items()
                            if who != "copy"})
        if flops:
            row["tflops"] = round(flops / times["ours"] / 1e12, 1)
            row["of_gemm"] = round(flops / times["ours"] * times["gemm"] / (2 * 8192 ** 3), 3)
        self.rows.append(row)
        print(f"{name:34s} " + "  ".join(f"{who} {rate:.0f}" for who, rate in rates.items()) +
              "  of copy " + " ".join(f"{who} {part}" for who, part in row["of_copy"].items()) +
              (f"  {row['tflops']} TFLOP/s, {row['of_gemm']} of gemm" if flops else ""),
              flush=True)

    def check(self, q, k, v, o, name):
        """Against fp32 over the first and last sequence."""
        group = q.shape[1] // k.shape[2]
        for s in (0, k.shape[0] - 1):
            keys = k[s].float().repeat_interleave(group, 1)
            values = v[s].float().repeat_interleave(group, 1)
            scores = torch.einsum("hd,shd->hs", q[s].float(), keys) * q.shape[2] ** -0.5
            want = torch.einsum("hs,shd->hd", scores.softmax(-1), values)
            error = (o[s].float() - want).abs().max().item()
            if not error < 0.02:
                print(f"{name}: WRONG by {error}")

    def grouped(self, batch, keys, page_size=None, heads=32, kv_heads=8, dim=128,
                dtype=torch.bfloat16, peers=True):
        size = page_size or keys
        name = (f"{heads}:{kv_heads} D{dim} {batch}x{keys}" +
                ("" if page_size is None else f" pages of {page_size}") +
                ("" if dtype == torch.bfloat16 else " f16"))
        if self.only not in name:
            return
        q = random_tensor(batch, heads, dim, dtype=dtype)
        k, v = (random_tensor(batch, keys, kv_heads, dim, dtype=dtype) for _ in range(2))
        o = torch.empty_like(q)
        ours = prepared(self.library, q, k, v, o, [keys] * batch, size)
        ours()
        if page_size is None:
            self.check(q, k, v, o, name)
        contenders = dict(copy=self.copy, ours=ours)
        if page_size is None and peers:
            views = [x.transpose(1, 2) for x in (q.unsqueeze(1), k, v)]

            def cudnn():
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    functional.scaled_dot_product_attention(*views, enable_gqa=True)
            contenders["cudnn"] = cudnn
            if flash_attention_4:
                contenders["fa4"] = lambda: flash_attention_4(q.unsqueeze(1), k, v)
        times = take_turns(contenders, self.rounds)
        self.report(name, times, 2 * k.numel() * k.element_size())

    def ragged(self, page_size=16):
        """Lengths from 100 to 32k."""
        name = f"32:8 D128 ragged pages of {page_size}"
        if self.only not in name:
            return
        torch.manual_seed(7)
        lengths = (100 * torch.exp(torch.rand(64) * 5.77)).int().tolist()
        q = random_tensor(64, 32, 128)
        k, v = (random_tensor(64, 32768, 8, 128) for _ in range(2))
        o = torch.empty_like(q)
        times = take_turns(dict(copy=self.copy, ours=prepared(self.library, q, k, v, o, lengths,
                                                              page_size)), self.rounds)
        self.report(name, times, 2 * sum(lengths) * 8 * 128 * 2)

    def latent(self, batch, keys, page_size=None, heads=128):
        size = page_size or keys
        name = f"MLA {heads} heads {batch}x{keys}" + (f" pages of {page_size}" if page_size else "")
        if self.only not in name:
            return
        q = random_tensor(batch, heads, 576)
        cache = random_tensor(batch, keys, 1, 576)
        o = torch.empty(batch, heads, 512, device="cuda", dtype=q.dtype)
        ours = prepared(self.library, q, cache, cache, o, [keys] * batch, size)
        ours()
        if page_size is None:
            self.check(q, cache, cache[..., :512], o, name)
        times = take_turns(dict(copy=self.copy, gemm=self.gemm, ours=ours), self.rounds)
        self.report(name, times, cache.numel() * 2, 2 * batch * keys * heads * (576 + 512))


def measure(bench):
    for batch, keys in ((1, 131072), (8, 32768), (64, 8192)):
        bench.grouped(batch, keys)
        bench.grouped(batch, keys, 16)
    for page_size in (1, 8, 64, 256):
        bench.grouped(64, 8192, page_size)
    bench.ragged()
    bench.grouped(8, 32768, dtype=torch.float16, peers=False)
    for dim in (64, 96, 192, 256):
        bench.grouped(64, 8192, heads=32, kv_heads=8, dim=dim, peers=dim == 64)
    bench.grouped(1, 32768)
    bench.grouped(256, 1024, peers=False)
    for batch, keys in ((64, 4096), (64, 8192), (128, 4096)):
        bench.latent(batch, keys)
        bench.latent(batch, keys, 64)


if __name__ == "__main__":
    run_bench(Bench, measure, flash_attention_4, __doc__, rounds=12)
