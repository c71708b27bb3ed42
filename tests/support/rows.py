"""Tables that one test walks through with the same programs, and errors that are awaited, in one line each."""

import contextlib

import pytest


@contextlib.contextmanager
def row(name):
    """A failure inside says in which row of the table it was."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError("row %r: %s: %s" % (name, type(error).__name__, error)) from error


def assert_raises(kind, text, act, *words, **options):
    """act(words..., options...) raises such an error, in which `text` is found, a regular expression. Gives the error."""
    with pytest.raises(kind, match=text) as caught:
        act(*words, **options)
    return caught.value


def assert_each_raises(kind, text, act, rows):
    """The same of act(row), for each row; `text` may be None."""
    for each in rows:
        with row(each[:60]):
            assert_raises(kind, text, act, each)
