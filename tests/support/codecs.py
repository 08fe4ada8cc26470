"""The settings under which every codec is tried: by the contract tests, and by the fuzzer."""

from typing import Any

from shoal.compression import codec

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in codec.names()),
    ("dense", {"levels": 2}),
    ("dense", {"levels": 2, "block": 0}),
    ("dense", {"bits": 2}),
    ("dense", {"bits": 4}),
    ("dense", {"bits": 8}),
    ("dense", {"bits": 8, "block": 0, "entropy": "none"}),
    ("sparse", {"bits": 3}),
    ("sparse", {"bits": 4, "entropy": "none"}),
    ("sparse", {"bits": 8, "density": 0.1}),
    ("sparse", {"density": 0.5, "chunk": 64}),
    ("topk", {"select": "threshold", "density": 0.05}),
    ("topk", {"bits": 3, "entropy": "huffman"}),
    ("random", {"scaling": "unbiased", "density": 0.2}),
    ("random", {"bits": 1, "density": 0.1}),
    ("rows", {"bits": 1, "row": 10}),
    ("rows", {"bits": 8, "density": 0.25}),
    ("dct", {"keep": 100, "bits": 3}),
    ("qsgd", {"bits": 2, "block": 16}),
    ("qsgd", {"bits": 8, "norm": "max", "entropy": "none"}),
    ("fp4", {"format": "e2m1"}),
    ("natural", {"rounding": "nearest"}),
    ("kmeans", {"density": 0.5, "centroids": 7, "encoding": "huffman"}),
    ("kmeans", {"encoding": "positions"}),
    ("kmeans", {"centroids": 2, "encoding": "gaps"}),
    ("lowrank", {"bits": 8, "entropy": "none"}),
    ("scalar", {"directions": "common", "perturbations": 40, "exponent": 2}),
    ("scalar", {"directions": "pool", "perturbations": 64, "exponent": 3}),
    ("scalar", {"directions": "pool", "sampling": "pro", "pool": 5000, "perturbations": 77}),
    ("projection", {"coefficients": 64, "block": 4096}),
    ("projection", {"coefficients": 150, "block": 500}),
    ("subspace", {"bits": 4, "dimension": 100}),
    ("subspace", {"dimension": 4000, "entropy": "none"}),
]
