"""Checks that a notebook reads aloud: shapes, claims, ranges. Used in every notebook."""


def check_shape(x, shape: tuple, name: str = "tensor"):
    """Return `x` if its shape is `shape` (None stands for any size), else raise ValueError."""
    got = tuple(x.shape)
    if len(got) != len(shape) or any(w not in (None, g) for g, w in zip(got, shape, strict=True)):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{name}: shape {got}, wanted {wanted}")
    return x


def check(claim: bool, what: str) -> None:
    """Print a tick and the claim, or raise AssertionError: for what holds at any scale."""
    if not claim:
        raise AssertionError(f"✗ {what}")
    print(f"✓ {what}")


def check_range(name: str, value: float, low: float, high: float, why: str) -> None:
    """Print a tick if low <= value <= high, or raise AssertionError: for measured numbers.

    `why` is the reason of the range, printed with it. NaN is outside every range.
    """
    if not low <= value <= high:
        raise AssertionError(f"✗ {name} = {value:.4g} is outside [{low:g}, {high:g}] ({why})")
    print(f"✓ {name} = {value:.4g} in [{low:g}, {high:g}] ({why})")
