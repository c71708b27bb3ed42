"""docopt 0.6.2, the version in Debian's python3-docopt: installed once from PyPI, and kept."""

from support.programs import install, kept


def old_docopt():
    """The folder that has its docopt.py."""
    return kept("docopt-0.6.2", lambda folder: install(folder, "docopt==0.6.2", "--no-deps"))
