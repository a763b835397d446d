"""The embedded source on this machine: what there is, and that planning with it is quick."""

import subprocess
import sys
from pathlib import Path

from zexp.data import embedded, recipe
from zexp.data.documents import Tally, documents, sample
from zexp.store.fingerprint import DigestCache


def test_this_machine_has_the_whole_source():
    sizes = {}
    for package in embedded.PACKAGES["high_quality"]:
        found = embedded.files(package)
        assert len({file.name for file in found}) == len(found)
        sizes[package] = sum(Path(file.path).stat().st_size for file in found)
    assert sizes["stdlib"] > 8e6
    assert sizes["numpy"] > 3e6
    assert sizes["scipy"] > 8e6
    assert sizes["topics"] > 4e5


def test_numpy_is_read_without_a_leak_between_its_views(tmp_path):
    cache = DigestCache(None)
    sides = {}
    for view in ("base", "high_quality"):
        tally = Tally()
        made = embedded.semantic(view, ["numpy"], cache, "source")
        found = list(documents(made, 0.1, directory=tmp_path, tally=tally))
        sides[view] = {d.file: d.heldout for d in found}
        assert tally.errors == []
        assert sum(len(d.text) for d in found) > 1e6
        assert len({d.digest for d in found}) == len(found)
    both = set(sides["base"]) & set(sides["high_quality"])
    assert len(both) > 100
    assert all(sides["base"][file] == sides["high_quality"][file] for file in both)


def test_a_plan_with_a_warm_cache_reads_no_file_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, zexp.data.recipe as r, zexp.store.files as f\n"
        "keys = {'kind': 'embedded', 'view': 'base'}\n"
        f"plan = lambda: r.source_semantic('base', keys, store_root={str(tmp_path)!r}, directory='.')\n"
        "first = plan(); read = []; opened = lambda event, arguments: event == 'open' and read.append(str(arguments[0]))\n"
        "sys.addaudithook(opened); again = plan()\n"
        "assert first == again\n"
        "assert r.tokens_bound(first) > 10_000_000\n"
        "print([name for name in read if name.endswith('.py')])\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'tokenizers', 'polars', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_versions_are_named():
    versions = embedded.versions(["stdlib", "numpy"])
    assert versions["stdlib"].startswith("3.")
    assert versions["numpy"][0].isdigit()


def test_the_numerics_of_a_view_enter_its_corpus(tmp_path):
    made = recipe.source_semantic(
        "b", {"kind": "embedded", "view": "base", "packages": ["numpy"]}, store_root=tmp_path, directory=tmp_path
    )
    assert recipe.source_numerics(made) == {"data.embedded": 2, "data.docstrings": 1}


def test_no_held_out_topic_trains_the_tokenizer(tmp_path):
    made = embedded.semantic("high_quality", ["topics"], DigestCache(None), "source")
    found = list(documents(made, 0.3, directory=tmp_path))
    heldout, training = ({d.text for d in found if d.heldout is side} for side in (True, False))
    assert len(heldout) > 5
    sampled = set(sample(made, 0.3, 10**9, directory=tmp_path))
    assert sampled >= training and not sampled & heldout
