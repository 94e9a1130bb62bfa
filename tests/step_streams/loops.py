"""The programs whose op streams record.py records, by name.

A loop takes the recorder `r`: `r.host(make, ...)` makes something on the host
and copies it to the device, `r.iteration()` says where an iteration begins.
"""

import torch

LOOPS = {}


def loop(function):
    LOOPS[function.__name__] = function
    return function


def randn(r, *shape):
    return r.host(torch.randn, *shape)


def randint(r, high, *shape):
    return r.host(torch.randint, high, shape)
