"""Tables that one test walks through with the same programs."""

import contextlib

import pytest


@contextlib.contextmanager
def row(name):
    """A failure inside says in which row of the table it was."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError("row %r: %s: %s" % (name, type(error).__name__, error)) from error
