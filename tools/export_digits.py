#!/usr/bin/env python3
"""Writes scikit-learn's handwritten digits as two IDX files.

    export_digits.py FOLDER

The data are the 1,797 images, 8×8 pixels of 0 to 16, that scikit-learn ships: the
test part of the UCI repository's "Optical Recognition of Handwritten Digits" (E.
Alpaydin and C. Kaynak, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0).

IDX is the format of MNIST (http://yann.lecun.com/exdb/mnist). All integers are
big-endian:

    digits-images.idx3-ubyte   uint32 0x00000803, uint32 images, uint32 rows,
                               uint32 columns, then a byte a pixel, row by row
    digits-labels.idx1-ubyte   uint32 0x00000801, uint32 labels, then a byte a label
"""

import argparse
import pathlib
import struct

UNSIGNED_BYTE = 0x08


def write_idx(path, array):
    """Writes `array`, whose values fit in bytes, to `path`, whole or not at all."""
    header = struct.pack(">HBB", 0, UNSIGNED_BYTE, array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(header + array.astype("uint8").tobytes())
    unfinished.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the files go")
    folder = parser.parse_args().folder

    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder / "digits-images.idx3-ubyte", digits.images)
    write_idx(folder / "digits-labels.idx1-ubyte", digits.target)
    print(f"{len(digits.target)} handwritten digits in {folder}")


if __name__ == "__main__":
    main()
