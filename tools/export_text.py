#!/usr/bin/env python3
"""Writes some 450 kB of English prose, as ASCII, for the language models.

    export_text.py FOLDER

The text is the Python language reference as every Python carries it for `help()`
(the module pydoc_data.topics), under the Python Software Foundation License,
version 2. It differs a little from one Python version to the next. The result,
`reference.txt`, has printable ASCII characters and line feeds only.
"""

import argparse
import pathlib
import sys

PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "…": "..."})


def prose(topics):
    """Returns the topics, each once (some have several names), in order of name."""
    text = "\n\n".join(dict.fromkeys(topics[name].strip() for name in sorted(topics)))
    text = text.translate(PUNCTUATION)
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the file goes")
    folder = parser.parse_args().folder

    try:
        from pydoc_data.topics import topics
    except ImportError:
        sys.exit(
            f"export_text: {sys.executable} has no module pydoc_data.topics, which is a part "
            "of Python's standard library; install the complete one (Debian: libpython3-stdlib)"
        )

    text = prose(topics)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "reference.txt.part"
    unfinished.write_text(text, encoding="ascii", newline="\n")
    unfinished.replace(folder / "reference.txt")
    print(f"{len(text)} characters of English in {folder}")


if __name__ == "__main__":
    main()
