"""A package, so that worker processes import test modules under the names that pytest gives them."""
