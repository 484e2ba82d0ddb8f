"""Triton's interpreter, without what it does over and over.

A launch replaces the language's functions by interpreted ones, and so does every call of a helper within it, which
finds them replaced; and numpy's type for one of Triton's is looked up in a table that is written out each time. With
kernels made of small helpers that was half of a test's time.
"""

from __future__ import annotations

import functools
from typing import Any


def make_quick() -> None:
    """Call before kernels run, once a process. Does nothing where the interpreter is built differently."""
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "GridExecutor", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in names) or hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    replace, launch, numpy_type = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    done: set[int] = set()
    known: dict[str, Any] = {}

    @functools.wraps(replace)
    def replace_once(fn: Any) -> Any:
        # What is replaced depends on the modules that the function's own module has imported.
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(fn.__globals__))
        return replace(fn)

    @functools.wraps(launch)
    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    @functools.wraps(numpy_type)
    def known_numpy_type(dtype: Any) -> Any:
        # The name says all: also the shape of a block, and what a pointer points to.
        if dtype.name not in known:
            known[dtype.name] = numpy_type(dtype)
        return known[dtype.name]

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._get_np_dtype = known_numpy_type
