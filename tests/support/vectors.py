"""Vectors that several tests of codecs share."""

X16 = [
    *(0.10, -0.90, 0.05, 0.40, -0.02, 0.70, -0.30, 0.01),
    *(0.00, -0.60, 0.20, -0.15, 0.08, 0.55, -0.45, 0.03),
]
"""Sixteen numbers that fit no grid: zero, two signs, no two magnitudes alike."""
