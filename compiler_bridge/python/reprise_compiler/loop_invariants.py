"""Moves what does not change in a loop out of it, in the C++ that Inductor writes.

Inductor computes a 0-dim tensor's consumers where their result is needed: the drift of
a random walk or an optimizer's bias correction is loaded, divided and rooted again for
every vector of the loop that uses it. g++ cannot move that out, since the loop writes
through other pointers to the same type. A quarter of a Monte-Carlo step's time went there.

Only loads of a fixed element from a buffer that the loop does not write, and arithmetic
on what has been moved already, are moved; to before the outermost loop. In Inductor's
terms all of a loop's loads see its buffers as they were before, so this changes no value.
Works on the text of torch 2.11.0's `codegen.cpp`: a line that looks otherwise stays.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from torch._inductor.codegen import cpp

_MARK = "/*loop invariant*/ "
_ASSIGNMENT = re.compile(r"auto (tmp\d+) = (.+);")
_TEMPORARY = re.compile(r"\btmp\d+\b")
_INVARIANT = re.compile(r"\binvariant\d+_\d+\b")
_ELEMENT = re.compile(r"\b((?:in|out|in_out)_ptr\d+)\[static_cast<int64_t>\(\d+L\)\]")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d*)?(?:[eE][-+]?\d+)?[LlFfUu]*(?!\w)")
_WORD = re.compile(r"[A-Za-z_]\w*")
_PURE = frozenset(
    "static_cast decltype float double bool int64_t int32_t int16_t int8_t uint8_t "
    "std at vec Vectorized VectorizedN c10 convert "
    "abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt pow sin cos tan tanh erf floor ceil "
    "trunc".split()
)

_body_numbers = itertools.count()
_stock_gen_body = cpp.CppKernel.gen_body
_stock_codegen_loops_impl = cpp.CppKernel.codegen_loops_impl


def patches() -> Iterator[tuple[Any, str, Any]]:
    yield cpp.CppKernel, "gen_body", _gen_body
    yield cpp.CppKernel, "codegen_loops_impl", _codegen_loops_impl


def _gen_body(self, code=None):
    """The body with its invariants marked, and named so that they may leave its scope."""
    body = _stock_gen_body(self, code)
    invariant: dict[str, str] = {}
    number = next(_body_numbers)
    lines = body._lines
    for index, line in enumerate(lines):
        if not isinstance(line, str):
            continue
        match = _ASSIGNMENT.fullmatch(line)  # so nothing that is indented: a lambda's, a loop's
        if match and _is_pure(match[2], invariant):
            invariant[match[1]] = f"invariant{number}_{match[1][3:]}"
            lines[index] = _MARK + line
    if invariant:
        for index, line in enumerate(lines):
            text = _text(line)
            renamed = _TEMPORARY.sub(lambda m: invariant.get(m[0], m[0]), text)
            if renamed != text:
                lines[index] = renamed if isinstance(line, str) else line._new_line(renamed)
    return body


def _text(line: Any) -> str:
    """A line of a buffer, which may be one whose writing is put off."""
    return line if isinstance(line, str) else getattr(line, "line", "")


def _is_pure(expression: str, invariant: dict[str, str]) -> bool:
    if any(name not in invariant for name in _TEMPORARY.findall(expression)):
        return False
    rest = _ELEMENT.sub("", _TEMPORARY.sub("", expression))
    return all(word in _PURE for word in _WORD.findall(_NUMBER.sub("", rest)))


def _codegen_loops_impl(self, loop_nest, code, worksharing):
    begin = len(code._lines)
    _stock_codegen_loops_impl(self, loop_nest, code, worksharing)
    nest = code._lines[begin:]
    place = _before_the_first_loop(nest)
    written = _written_pointers(nest)
    kept: list[Any] = []
    moved: list[str] = []
    stays: set[str] = set()
    for line in nest:
        if not isinstance(line, str) or _MARK not in line:
            kept.append(line)
            continue
        statement = line.replace(_MARK, "")
        name, *used = _INVARIANT.findall(statement)
        pointers = {match[1] for match in _ELEMENT.finditer(statement)}
        if place is None or pointers & written or not stays.isdisjoint(used):
            stays.add(name)
            kept.append(statement)
        else:
            moved.append(statement.strip())
    if moved:
        # All of `nest` up to `place` was kept: no body stands before the first loop.
        indent = re.match(r"\s*", nest[place])[0]
        kept[place:place] = [indent + statement for statement in moved]
    code._lines[begin:] = kept


def _before_the_first_loop(lines: list[Any]) -> int | None:
    for index, line in enumerate(lines):
        if isinstance(line, str) and line.lstrip().startswith("for(int64_t x"):
            while index > 0 and _is_loop_pragma(lines[index - 1]):
                index -= 1
            return index
    return None


def _is_loop_pragma(line: Any) -> bool:
    return isinstance(line, str) and line.lstrip().startswith(
        ("#pragma omp for", "#pragma omp simd", "#pragma GCC ")
    )


def _written_pointers(lines: list[Any]) -> set[str]:
    """Pointers that occur otherwise than in loads of a fixed element, and may be written."""
    written = set()
    for line in lines:
        text = _text(line)
        if _MARK not in text:
            written.update(re.findall(r"\b(?:out|in_out)_ptr\d+\b", text))
    return written
