"""ratrod.py as a text, parsed once for all: its sections, what the core touches, how long things are, and what writes to the log."""

import ast
import functools
import re

from support.programs import ROOT

SOURCE = (ROOT / "ratrod.py").read_text(encoding="utf-8")
# What touches the world, as modules and built-in functions, and the few uses of it that the core's sections have.
OUTSIDE = {"socket", "selectors", "threading", "queue", "signal", "logging", "log", "time", "os", "open", "print", "input", "random", "subprocess",
           "select", "asyncio", "multiprocessing", "sys", "datetime", "pathlib", "io", "__import__", "eval", "exec"}
ALLOWED = {
    2: set(),
    3: {"os", "open", "time.time"},  # key files; a file that changed twice within a tick of its clock
    4: {"os.fsencode", "os.path", "datetime", "datetime.datetime"},  # texts of paths and of dates
    5: {"os.urandom"},
    6: {"os.urandom"},
}


@functools.lru_cache(maxsize=None)
def statements():
    """(section by the banners, statement, its nodes: each before what is in it) of the whole module."""
    banners = {int(match.group(1)): SOURCE.count("\n", 0, match.start()) for match in re.finditer(r"^# =+\n# (\d+)\. .*\n# =+\n", SOURCE, re.M)}
    return [(max((n for n, line in banners.items() if line < statement.lineno), default=0), statement, list(ast.walk(statement)))
            for statement in ast.parse(SOURCE).body]


def uses_of_outside(nodes):
    """What of OUTSIDE a statement names: `module.function`, or the name alone where it stands alone."""
    spoken_for = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OUTSIDE:
            spoken_for.add(node.value)
            yield "%s.%s" % (node.value.id, node.attr)
        elif isinstance(node, ast.Name) and node.id in OUTSIDE and node not in spoken_for:
            yield node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from OUTSIDE.intersection([getattr(node, "module", None), *(alias.name for alias in node.names)])


def test_the_core_does_no_io():
    for section, allowed in ALLOWED.items():
        used = {use for number, _, nodes in statements() if number == section for use in uses_of_outside(nodes)}
        assert not {use for use in used if use not in allowed and use.split(".")[0] not in allowed}, section


def names_in(nodes, context):
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def names_of(statement, nodes):
    """What a statement of the module defines."""
    return {statement.name} if hasattr(statement, "name") else names_in(nodes, ast.Store)


def test_the_page_at_the_top_names_what_is_there():
    page, there = SOURCE[SOURCE.index("# ---- Contents"):SOURCE.index("\nimport atexit")], set()
    for _, statement, nodes in statements():
        there |= names_of(statement, nodes)
        if isinstance(statement, ast.ClassDef):
            there.update("%s.%s" % (statement.name, part.name) for part in statement.body if isinstance(part, ast.FunctionDef))
    named = set(re.findall(r"`([A-Z][A-Za-z_.]*)`", page))
    assert len(named) > 40
    assert not named - there
    contents = page[:page.index("# ---- The life")]
    numbers = sorted(map(int, re.findall(r"(?:^#|  ) *(\d+) [A-Za-z]", contents, re.M)))
    assert numbers == sorted({section for section, *_ in statements()} - {0}) == list(range(1, 17))


def test_each_section_uses_only_what_stands_above_it_or_in_it():
    places = {}
    for section, statement, nodes in statements():
        for name in names_of(statement, nodes):
            places.setdefault(name, section)
    for section, statement, nodes in statements():
        if section in (1, *ALLOWED):
            own = names_in(nodes, ast.Store) | {node.arg for node in nodes if isinstance(node, ast.arg)}
            below = {name for name in names_in(nodes, ast.Load) - own if places.get(name, 0) > section}
            assert not below, "line %d: section %d uses %s" % (statement.lineno, section, sorted(below))


def test_lines_functions_and_classes_can_be_read():
    assert max(map(len, SOURCE.split("\n"))) <= 120
    for kind, most in ((ast.FunctionDef, 45), (ast.ClassDef, 350)):
        assert not [node.name for _, _, nodes in statements() for node in nodes if isinstance(node, kind) and node.end_lineno - node.lineno >= most]


def test_a_line_that_a_peer_can_cause_goes_through_complain():
    """Of what serves peers only these say something by themselves: what they say follows a change of the administrator's, is said once a minute,
    or follows a line that was bounded. Anything else would let a peer fill the disk."""
    lines, direct = SOURCE.split("\n"), set()
    for section, statement, _ in statements():
        if isinstance(statement, ast.ClassDef) and section in (7, 8, 9, 10, 12, 13):
            for part in statement.body:
                if isinstance(part, ast.FunctionDef) and re.search(
                        r"\blog\.(info|warning|error|log)\(", "\n".join(lines[part.lineno - 1:part.end_lineno])):
                    direct.add("%s.%s" % (statement.name, part.name))
    # Of the client's user, and of its tries, which have their pauses.
    own = ("Client.", "FirstConnection.", "HostKeys.", "Reach.", "Retry.", "ReverseTunnel.", "Stdio")
    assert {name for name in direct if not name.startswith(own)} <= {
        "Complaints.complain", "Complaints.sweep", "Counters.on_resumed", "Endpoint.__init__", "Endpoint.drain", "Endpoint.reload",
        "Listener._starve", "ReverseListeners.check", "Rules.have_changed", "Server._end_key"}


def test_no_text_is_taken_for_a_format():
    """`%` in what somebody else has said must not be read as a format: the first argument of a line of the log is a constant, or the only one."""
    calls = [node for _, _, nodes in statements() for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
             and node.func.attr in ("debug", "info", "warning", "error", "critical", "exception", "log")]
    assert len(calls) > 20
    for call in calls:
        text, *arguments = call.args[call.func.attr == "log":]
        assert isinstance(text, ast.Constant) or not arguments, "line %d" % call.lineno
