"""What codecs that treat each tensor by itself know of the model: the shapes, from its layout."""

import math
from dataclasses import replace
from typing import Any, TypeVar

from shoal.compression.codec import Shapes

P = TypeVar("P")


def with_shapes(part: P, shapes: Shapes) -> P:
    """Return the codec for vectors of these tensors: its field `shapes`, which is no setting."""
    made: Any = replace(part)  # type: ignore[type-var]
    object.__setattr__(made, "shapes", tuple(tuple(shape) for shape in shapes))
    return made  # type: ignore[no-any-return]


def tensors(shapes: Shapes | None, size: int) -> Shapes:
    """Return the shapes that a vector of `size` is made of, without empty ones."""
    found = (
        tuple(s for s in shapes if math.prod(s)) if shapes is not None else ((size,),) * bool(size)
    )
    if sum(math.prod(s) for s in found) != size:
        raise ValueError(f"a vector of {size} elements is not made of tensors {shapes}")
    return found
