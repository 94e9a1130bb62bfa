"""Prints, for LibTorch.cmake, where torch lies and how it was built.

A CMake list: version; folder; C++11 ABI flag; pybind11's headers; CUDA version
or `none`; then the folders of the nvidia wheels beside it.
"""

import glob
import os

import torch

folder = os.path.dirname(torch.__file__)
try:
    import pybind11

    pybind11_include = pybind11.get_include()
except ImportError:
    pybind11_include = os.path.join(folder, "include")
wheels = sorted(
    os.path.dirname(lib)
    for lib in glob.glob(os.path.join(os.path.dirname(folder), "nvidia", "*", "lib"))
)
print(
    ";".join(
        [
            torch.__version__.split("+")[0],
            folder,
            str(int(torch._C._GLIBCXX_USE_CXX11_ABI)),
            pybind11_include,
            torch.version.cuda or "none",
            *wheels,
        ]
    )
)
