"""bench.py runs with either load generator, and its JSON has its shape; what it measures is not judged. RATROD_LONG=1 takes all with each."""

import json
import subprocess
import sys

import pytest

from support.pressure import LONG
from support.programs import ROOT

UDP = {"udp_%d_%d%s" % (outstanding, size, lost) for outstanding in (1, 64) for size in (64, 1200) for lost in ("", "_lost")}


def run(tmp_path, *words):
    """What it wrote with --json, and what it printed."""
    file = tmp_path / "results.json"
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "tools" / "bench.py"), "--quick", "--seconds", "0.1", "--json", str(file), *words],
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return json.loads(file.read_text("utf-8")), done.stdout.decode("utf-8")


def test_everything_about_ratrod(tmp_path):
    svg = tmp_path / "results.svg"
    results, printed = run(tmp_path, "--only", "none,ratrod-chacha", "--measure", "roundtrip,startup" + ",udp,firstbyte" * LONG, "--targets",
                           "--markdown", "--repeat", "2", "--svg", str(svg))
    assert {"machine", "scale", "titles", "measures", "targets"} <= set(results)
    assert set(results["measures"]) == {"p50", "p99", "start_up", "start_up_nacl"} | ({"first_byte"} | UDP if LONG else set())
    for key, measure in results["measures"].items():
        assert {"label", "unit", "better", "measure", "results"} <= set(measure)
        starts = {"python-pass", "python-imports", "ratrod-help", "ratrod-script"}
        tunnels = {"ratrod-help"} if key == "start_up_nacl" else starts if key == "start_up" else {"none", "ratrod-chacha"}
        assert set(measure["results"]) == tunnels
        for outcome in measure["results"].values():
            assert not outcome["failures"] and len(outcome["values"]) == 2
            assert outcome["min"] <= outcome["median"] <= outcome["max"]
    for target in results["targets"]:
        assert set(target) == {"name", "required", "reached", "met"}
        assert (target["met"] is None) == (target["reached"] is None)
    for title in ("no tunnel", "ratrod.py (ChaCha20)"):
        assert title in printed and title in svg.read_text("utf-8")
    assert "| no tunnel |" in printed


@pytest.mark.parametrize("words, measures", [((), "bulk,connections,udp,idle"), (("--python-load",), "bulk,roundtrip,udp,firstbyte")],
                         ids=["compiled if possible", "python"])
def test_each_load_generator(tmp_path, words, measures):
    results, _ = run(tmp_path, "--only", "ratrod-legacy", "--measure", "bulk,connections,roundtrip,udp,firstbyte,idle" if LONG else measures, *words)
    assert "bench_load.py" in results["machine"]["generator"] or not words
    assert set(results["measures"]) > UDP
    for key, measure in results["measures"].items():
        for outcome in measure["results"].values():
            # Small enough on a busy machine to be nothing: memory is a difference, and one of CPU can be 0.
            assert not outcome["failures"] and (outcome["median"] > 0 or key == "idle" or key.endswith(("_lost", "_cpu"))), key
