"""Runs the notebooks of the pages again, and keeps them with their new outputs.

python docs/run_notebooks.py                    # all
python docs/run_notebooks.py which-rule.ipynb   # some
"""

import os
import pathlib
import sys

import nbclient
import nbformat


DOCS = pathlib.Path(__file__).parent


def run(path):
    notebook = nbformat.read(path, as_version=4)
    env = os.environ | {"PYTHONPATH": str(DOCS.parent.resolve())}
    # Times of cells would be another line in every change.
    client = nbclient.NotebookClient(notebook, record_timing=False)
    client.execute(env=env, cwd=str(DOCS))
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in DOCS.glob("*.ipynb")):
        run(DOCS / name)
